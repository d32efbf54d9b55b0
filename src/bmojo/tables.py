"""Tables of measured values: the best and the worst of a column are marked, and noise decides what is worse.

Every table is made of Columns of Cells. A cell has a band [low, high] of values that count as equal to it, so one rule
says what is worse by more than noise, whatever the metric: the bands of the two cells don't overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB")


@dataclass(frozen=True)
class Cell:
    """A measured value as shown, and the band [low, high] that counts as equal to it."""

    value: float
    text: str
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """One metric of several models. `best` is min or max, or None where no value is better than another."""

    name: str
    head: tuple[str, ...]
    cells: dict[str, Cell]
    best: Callable[..., str] | None

    def extreme(self, worst: bool = False) -> str | None:
        """The preset with the best (or worst) value, None if there is none or all look the same."""
        if self.best is None or len({cell.text for cell in self.cells.values()}) < 2:
            return None
        pick = self.best if not worst else (max if self.best is min else min)
        return pick(self.cells, key=lambda preset: self.cells[preset].value)

    def loses(self, preset: str) -> bool:
        """Whether a preset is worse than the best by more than noise."""
        winner = self.extreme()
        if winner is None or preset not in self.cells:
            return False
        cell, best = self.cells[preset], self.cells[winner]
        return cell.low > best.high or cell.high < best.low

    def mark(self, preset: str) -> str:
        """'best', 'worst' (only if it loses) or ''. Values that look the same are marked the same."""
        best, worst = self.extreme(), self.extreme(worst=True)
        if best is None or worst is None or preset not in self.cells:
            return ""
        text = self.cells[preset].text
        if text == self.cells[best].text:
            return "best"
        return "worst" if text == self.cells[worst].text and self.loses(worst) else ""


@dataclass(frozen=True)
class Table:
    """`presets` names the rows."""

    presets: list[str]
    columns: list[Column]

    @property
    def heads(self) -> list[list[str]]:
        """The lines of each column's head, the first with an arrow to the better side."""
        arrows: dict[Any, str] = {min: " ↓", max: " ↑", None: ""}
        return [[column.head[0] + arrows[column.best], *column.head[1:]] for column in self.columns]

    @property
    def rows(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Each preset with its (text, mark) per column."""
        for preset in self.presets:
            cells = [(c.cells[preset].text if preset in c.cells else "–", c.mark(preset)) for c in self.columns]
            yield preset, cells


def markdown(table: Table) -> str:
    """A table in GitHub's markdown: the best of a column in bold, the worst followed by ▼."""
    show = {"best": "**{}**", "worst": "{} ▼", "": "{}"}
    lines = [["model", *("<br>".join(head) for head in table.heads)], ["---", *["---:"] * len(table.columns)]]
    lines += [[f"`{preset}`", *(show[mark].format(text) for text, mark in cells)] for preset, cells in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def unit_of(size: float) -> int:
    """The power of 1024 to write a size of that many bytes in."""
    return min(max(int(math.log2(max(size, 1)) // 10), 0), len(UNITS) - 1)


def size_text(size: float, unit: int | None = None) -> str:
    """A number of bytes in the given or the nearest unit."""
    unit = unit_of(size) if unit is None else unit
    return f"{three_digits(size / 1024**unit) if unit else f'{size:,.0f}'} {UNITS[unit]}"
