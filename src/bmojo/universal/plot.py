"""A Solomonoff table as one figure: which strings, how sure, how much of it all, and how near the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bmojo.errors import UniversalError
from bmojo.figures import Picture, make_picture, new_figure
from bmojo.universal.table import SolomonoffTable

TREE = 5  # bits
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def table_picture(tables: Sequence[SolomonoffTable]) -> Picture:
    """The picture "table": four panels of the deepest of the tables; the others, of lower depth, show how it converges.

    Raises UniversalError for tables that differ in more than their depth, or not in it.
    """
    *lower, table = sorted(tables, key=lambda table: table.depth)
    for other in lower:
        for name in ("identity", "n_bits", "steps"):
            theirs, its = getattr(other, name), getattr(table, name)
            if theirs != its:
                raise UniversalError(f"tables to plot must differ in depth alone, got {name} {theirs!r} and {its!r}")
    if len({table.depth for table in tables}) < len(tables):
        raise UniversalError(f"tables to plot must differ in depth, got {[table.depth for table in tables]}")
    figure, axes = new_figure(4)
    figure.set_size_inches(11, 9)
    _ranks(axes[0], table)
    _tree(axes[1], table)
    _positions(axes[2], table)
    if lower:
        _convergence(axes[3], table, lower)
    else:
        _masses(axes[3], table)
    caption = (
        f"Solomonoff's mixture of the machine {table.machine}: programs of up to {table.depth} instructions, "
        f"{table.steps:,} steps from one to the next, strings of {table.n_bits} bits."
    )
    figure.suptitle(caption, fontsize=10)
    return make_picture(figure, axes, "table", caption)


def _ranks(axis, table: SolomonoffTable) -> None:
    counts = table.levels()[table.n_bits]
    ranked = np.sort(counts[counts > 0])[::-1] / table.total
    axis.loglog(np.arange(1, len(ranked) + 1), ranked, color=BLUE, linewidth=1.4)
    best = [(text, share) for text, share in table.top(10) if share]
    axis.plot(range(1, len(best) + 1), [share for _, share in best], "o", color=RED, markersize=3)
    listed = "\n".join(f"{text}  {share:.1e}" for text, share in best)
    axis.text(0.02, 0.03, listed, transform=axis.transAxes, fontsize=7, family="monospace", color=RED)
    axis.axhline(2.0**-table.n_bits, color=GREY, linestyle="--", linewidth=1)
    axis.annotate("uniform", (1, 2.0**-table.n_bits), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axis.set(xlabel=f"rank, of the {len(ranked):,} strings printed", ylabel="M(x)", title="probability by rank")


def _tree(axis, table: SolomonoffTable) -> None:
    """Prefixes of up to TREE bits: across is the string as a binary fraction, the size is M_norm, the colour P(1)."""
    points = []
    for t, (weights, ones) in enumerate(zip(table.measures[: TREE + 1], table.predictions, strict=False)):
        places = (np.arange(1 << t) + 0.5) / (1 << t)
        if t < min(TREE, table.n_bits - 1):
            for place in places:
                for child in (-1, 1):
                    axis.plot([place, place + child / (4 << t)], [-t, -t - 1], color="#cccccc", linewidth=0.7, zorder=1)
        points += [(x, -t, w, p) for x, w, p in zip(places, weights, ones, strict=True)]
    x, y, weight, one = np.array(points).T
    dots = axis.scatter(x, y, s=12 + 420 * weight, c=one, cmap="coolwarm", vmin=0, vmax=1, zorder=2, edgecolor="white")
    axis.figure.colorbar(dots, ax=axis, label="P(next bit is 1)", shrink=0.8)
    axis.grid(False)
    axis.set_xticks([1 / 64, 63 / 64], ["0 0 0 …", "1 1 1 …"])
    axis.set_yticks(range(-min(TREE, table.n_bits - 1), 1), range(min(TREE, table.n_bits - 1), -1, -1))
    axis.set(ylabel="bits seen", title="what comes next (size: probability of the prefix)")


def _positions(axis, table: SolomonoffTable) -> None:
    entropies = []
    for weights, ones in zip(table.measures, table.predictions, strict=False):
        each = np.stack([1 - ones, ones], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropies.append(float(weights @ -np.where(each > 0, each * np.log2(each), 0).sum(1)))
    t = np.arange(1, table.n_bits + 1)
    axis.plot(
        t, entropies, "o-", color=BLUE, markersize=4, label=f"entropy of the next bit ({sum(entropies):.2f} in all)"
    )
    shares = np.array(table.coverage()[1:]) / 2.0**t
    axis.plot(t, shares, "s-", color=GREEN, markersize=4, label="share of all strings that are printed")
    axis.set(xlabel="bit", ylabel="bits, share", ylim=(0, 1.05), title="by position")


def _convergence(axis, table: SolomonoffTable, lower: Sequence[SolomonoffTable]) -> None:
    depths = [other.depth for other in lower]
    gaps = [table.divergence(other) for other in lower]
    axis.semilogy(depths, gaps, "D-", color=RED, markersize=4, label=f"KL(M to depth {table.depth} || M to depth D)")
    for depth, gap in zip(depths, gaps, strict=True):
        axis.annotate(f"{gap:.2g}", (depth, gap), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="D, instructions", ylabel="bits", title="how near its limit")
    axis.set_xticks(depths)


def _masses(axis, table: SolomonoffTable) -> None:
    mass = {kind: count / table.total for kind, count in table.mass().items() if count}
    axis.barh(list(mass), list(mass.values()), color=BLUE)
    for place, share in enumerate(mass.values()):
        axis.annotate(f"{share:.2g}", (share, place), xytext=(4, -3), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(10.0 ** math.floor(math.log10(min(mass.values()))), 5)
    axis.set(xlabel="share of all programs", title="where the mass goes")
