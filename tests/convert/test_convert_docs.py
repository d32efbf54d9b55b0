"""docs/convert.md names every format, and its figures are the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from bmojo.convert import FORMATS

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/convert.md").read_text(encoding="utf-8")


def test_every_format_is_named():
    assert all(f"`{name}`" in DOCS for name in FORMATS)


def test_the_figures_are_those_of_the_benchmark():
    report = json.loads((ROOT / "benchmarks/results/real_model.json").read_text())
    assert report["broken"] == []
    same = report["same"]
    for figure in (f"{same['tokens']:,} tokens", f"{same['logits_rms']:.1e} of", f"{same['logits_max']:.1e})"):
        assert figure in DOCS
    for name in ("original", "converted"):
        assert f"{same['perplexity'][name]:.4f}" in DOCS
        assert f"({same['bits_per_byte'][name]:.4f} bits per byte" in DOCS
    for name, form in report["stream"]["forms"].items():
        perplexity = [*list(form["perplexity_by_position"].values())[1:], form["perplexity"]]
        first, *_, last = form["state_bytes"].values()
        cells = [name, *(f"{x:.2f}" for x in perplexity), f"{form['bits_per_byte']:.4f}"]
        assert f"| {' | '.join(cells)} | {first / 1e6:.1f} MB, {last / 1e6:.1f} MB |" in DOCS
