"""The benchmark that sets the family beside the best predictors: its models are equal, and it goes on where it was."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from bmojo import presets
from bmojo.data.synthetic import make_task
from bmojo.nn.count import parameters
from bmojo.nn.model import BMojoLM


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "benchmarks_universal", Path(__file__).parents[2] / "benchmarks/universal.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", ["universal", "markov_tree", "linear_gaussian"])
def test_models_are_equal_but_for_their_memories(benchmark, source):
    configs = {model: benchmark.SOURCES[source].config(model) for model in presets.COMPARED}
    for config in configs.values():
        assert 95_000 <= parameters(config) <= 105_000
        assert not config.window or config.window < benchmark.SOURCES[source].task.length / 3
    eidetic, fading = (configs[model].to_dict() for model in ("bmojo", "bmojo_f"))
    assert {key for key in eidetic if eidetic[key] != fading[key]} == {"eidetic_slots", "intermediate_size"}


@pytest.mark.slow
def test_it_goes_on_and_reports(benchmark, tmp_path, monkeypatch):
    small = dataclasses.replace(
        benchmark.SOURCES["markov_tree"], task=make_task("markov_tree", length=16, depth=3), batch_size=2, window=4
    )
    monkeypatch.setattr(benchmark, "SOURCES", {"markov_tree": small})
    monkeypatch.setattr(benchmark, "SEQUENCES", {"curve": 8, "final": 12})
    options = argparse.Namespace(work=tmp_path / "work", out=tmp_path / "out", steps=32, learning_rate=1e-3)
    for model in ("bmojo_f", "bmojo"):
        benchmark.run("markov_tree", model, 0, options)
    scores = tmp_path / "work/markov_tree/bmojo-0/scores.json"
    run = json.loads(scores.read_text())
    assert [at["sequences"] for at in run["curve"]] == [64]
    assert run["final"]["total"] == pytest.approx(sum(run["final"]["positions"]))
    scores.unlink()  # stopped when it had trained: the same scores without training again
    monkeypatch.setattr(BMojoLM, "forward", torch.no_grad()(BMojoLM.forward))
    benchmark.run("markov_tree", "bmojo", 0, options)
    again = json.loads(scores.read_text())
    assert again == {**run, "machine": again["machine"]}
    benchmark.report([json.loads(path.read_text()) for path in sorted(options.work.glob("*/*/scores.json"))], options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "figures"}
    table = (tmp_path / "out/table.md").read_text()
    assert f"| `bmojo` | {run['final']['total']:.2f} ±" in table
    assert "| `CTW-8` |" in table
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["runs"]) == 2
    assert (tmp_path / "out/figures/context.png").stat().st_size > 10_000


def test_the_page_shows_the_tables_that_were_measured():
    folder = Path(__file__).parents[2] / "docs/results"
    page, measured = ((folder / name).read_text() for name in ("universal.md", "universal/table.md"))
    rows = [line for line in measured.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    assert all(row in page for row in rows)
    results = json.loads((folder / "universal/results.json").read_text())
    for run in results["runs"]:
        assert 95_000 <= run["parameters"] <= 105_000
        assert sum(run["final"]["positions"]) == pytest.approx(run["final"]["total"], abs=1e-2)
