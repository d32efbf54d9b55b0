"""Figures: the colours of the presets, and the axes, lines and legends that all figures have in common."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmojo.files import optional_module, write_whole

# Colours of Okabe and Ito, told apart with any colour vision. The order is that of every table and figure.
STYLES = {
    "transformer": ("#000000", "o"),
    "swa": ("#56B4E9", "s"),
    "mamba": ("#F0E442", "<"),
    "mamba2": ("#009E73", "^"),
    "gdn": ("#E69F00", "v"),
    "hybrid": ("#CC79A7", "P"),
    "bmojo_f": ("#0072B2", "X"),
    "bmojo": ("#D55E00", "D"),
}
OTHER_STYLE = ("#777777", "*")


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write NAME.png into `folder`, each whole or not at all, and delete the other figures there."""
    for old in folder.glob("*.png"):
        if old.stem not in {picture.name for picture in pictures}:
            old.unlink()
    for picture in pictures:
        write_whole(folder / f"{picture.name}.png", picture.png)


def order(preset: str) -> int:
    """The place of a preset, or of a line named after one ("bmojo, window=16"), in tables and figures."""
    preset = preset.partition(",")[0]
    return [*STYLES, preset].index(preset)


def new_figure(panels: int = 1, share_y: bool = False, columns: int = 2) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, at most `columns` side by side."""
    rows, across = math.ceil(panels / columns), min(panels, columns)
    figure = optional_module("matplotlib.figure", "the report").Figure(
        figsize=(8.4, 3.6 * rows + 0.6), layout="constrained"
    )
    axes = list(figure.subplots(rows, across, sharey=share_y, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    for axis in axes[:panels]:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def draw(axis: Any, preset: str, points: Iterable[tuple[float, float]], every: int = 1, **changes: Any) -> None:
    """A line in the preset's style, with `changes` of how matplotlib draws it."""
    colour, marker = STYLES.get(preset, OTHER_STYLE)
    x, y = zip(*points, strict=True)
    style = {"color": colour, "marker": marker, "label": preset, "linewidth": 1.6, "markersize": 5, "markevery": every}
    axis.plot(x, y, **(style | changes))


def token_axis(axis: Any, label: str) -> None:
    """A log2 axis of token counts, ticks written in full."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(label)


def make_picture(figure: Any, axes: list[Any], name: str, caption: str) -> Picture:
    """The figure as PNG, with one legend of all its lines below."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=order)
    columns = max(1, min(7, 110 // (max(map(len, [*labels, "-"])) + 5)))
    figure.legend(
        [handles[k] for k in labels], labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return Picture(name, caption, buffer.getvalue())


def line_at(axis: Any, x: float, label: str) -> None:
    axis.axvline(x, color="#555555", linestyle="--", linewidth=1)
    place = {"xy": (x, 1), "xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (4, -4)}
    axis.annotate(label, **place, rotation=90, va="top", fontsize=8, color="#555555")
