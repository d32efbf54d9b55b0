"""A needle in a haystack of real text, by the length of the text and the depth at which it is hidden."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bmojo.data.synthetic import Needle
from bmojo.eval.tasks import ask, wilson
from bmojo.files import optional_module
from bmojo.nn.model import BMojoLM


def needle_grid(
    model: BMojoLM, needles: Iterable[Needle], *, rows: int = 16, batch_size: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """For each of `needles`, over `rows` texts:

    length, depth  of the needle
    exact          share of the answers that are right to the last token: those that greedy decoding would give
    ci95           its 95 % interval (Wilson)
    bits           mean -log2 p(answer), of all its tokens together

    Raises ConfigError if the vocabulary of the model is smaller than the text's.
    """
    cells = []
    for needle in needles:
        found = ask(model, needle, rows=rows, batch_size=batch_size, seed=seed)
        exact = float((np.bincount(found.row, ~found.right, minlength=rows) == 0).mean())
        cell = {"length": needle.length, "depth": needle.depth, "exact": exact, "ci95": wilson(exact, rows)}
        cells.append({**cell, "bits": float(found.bits.sum() / rows)})
    return cells


def draw_grid(cells: Sequence[dict[str, Any]]) -> bytes:
    """A heat map of `exact` over length and depth, as PNG."""
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    share = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        share[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["exact"]
    size = (2.4 + 0.8 * len(lengths), 1.6 + 0.45 * len(depths))
    figure = optional_module("matplotlib.figure", "--figure").Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        colour = "black" if value > 0.5 else "white"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="length, tokens", ylabel="depth of the needle")
    figure.colorbar(image, ax=axis, label="share exactly right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
