"""How far `bmojo diagnose` can be trusted: predictors that are known to be right, or to be cut short.

    python benchmarks/diagnose.py --out docs/results/diagnose [--runs 200]

exact     The true probabilities of a Markov chain of four symbols, whose rows have entropies from 0.2 to 2 bits, so
          that the variance of errors depends on the past. 2,000 tokens a run; the share of runs in which each test
          rejects, at 5 %: the portmanteau test of all lags, and any lag after Holm's correction, by the table's
          chi-square and by the martingale null; any band of a probe; and all of these together, as they are by default.
cut       Uniform probabilities for a source that repeats its token of 19 before with probability 0.2, else draws it
          uniformly from six: the best that a window of 16 can do. 8,000 tokens a run; the share of runs in which a band
          fails.

`models.png` is drawn of what `bmojo diagnose --out` wrote there of trained models (docs/diagnose.md has the commands).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.eval.diagnose import Reading, bands, diagnose, token_basis
from bmojo.figures import draw, make_picture, new_figure, token_axis
from bmojo.files import write_whole
from bmojo.realize.whiteness import whiteness
from bmojo.train.machine import machine

CHAIN = np.array([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.02, 0.9, 0.04, 0.04], [0.4, 0.1, 0.1, 0.4]])
LAG, SHARE, SYMBOLS = 19, 0.2, 6
PROBES = ("own_past", "text", "repeats")
MODELS = {"swa4": "swa", "swa16": "swa", "transformer": "transformer", "mamba2": "mamba2", "bmojo16": "bmojo"}


def reading(tokens: np.ndarray, q: np.ndarray) -> Reading:
    """What a predictor q [T, vocab] of tokens [T] leaves, in one-hot vectors."""
    basis = token_basis(np.bincount(tokens, minlength=q.shape[1]), None)
    errors = basis[tokens] - q @ basis
    errors[0] = 0
    return Reading(tokens, basis[tokens], errors, np.arange(len(tokens)) > 0)


def exact(random: np.random.Generator, seed: int) -> dict[str, bool]:
    tokens, sums = [0], CHAIN.cumsum(1)
    for u in random.random(1999):
        tokens.append(int((u > sums[tokens[-1]]).sum()))
    x = np.array(tokens)
    left = reading(x, np.vstack([np.full(4, 0.25), CHAIN[x[:-1]]]))
    found = diagnose(left, bands((1, 4, 16)), level=0.25, seed=seed)  # 0.05 for each of five
    table = whiteness(left.errors, found.lags)
    return {
        "all lags, table": bool(table.total_p[-1] < 0.05),
        "any lag, table": bool(table.failing),
        "all lags, martingale": found.p < 0.05,
        "any lag, martingale": bool(found.failing),
        **{f"any band, {name}": any(probe.fails for probe in getattr(found, name)) for name in PROBES},
        "anything": not diagnose(left, bands((1, 4, 16)), seed=seed).white,
    }


def cut(random: np.random.Generator, seed: int) -> dict[str, bool]:
    tokens = random.integers(0, SYMBOLS, 8000)
    for t in LAG + np.flatnonzero(random.random(8000 - LAG) < SHARE):
        tokens[t] = tokens[t - LAG]
    found = diagnose(reading(tokens, np.full((8000, SYMBOLS), 1 / SYMBOLS)), bands((1, 4, 16, 64)), seed=seed)
    fails = {
        f"{name}, lags {first} to {last}": probe.fails
        for name in PROBES
        for (first, last), probe in zip(found.bands, getattr(found, name), strict=False)
    }
    return {f"lag {LAG}": LAG in found.failing, "any other lag": bool(set(found.failing) - {LAG, 2 * LAG}), **fails}


def figure(folder: Path) -> None:
    """What repeats and past text explain of the errors of each model, by band."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in MODELS
             if (folder / f"{name}.json").is_file()}  # fmt: skip
    picture, axes = new_figure(2)
    for axis, column, title in zip(axes, ("repeats", "text"), ("by repeats", "by past text"), strict=True):
        for name, model in found.items():
            points = [((first * last) ** 0.5, 100 * probe["share"])
                      for (first, last), probe in zip(model["bands"], model[column], strict=False)]  # fmt: skip
            style = {"linestyle": "--"} if name == "swa4" else {}
            draw(axis, MODELS[name], points, label=name, **style)
        token_axis(axis, "lag, tokens")
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.set_title(f"errors explained {title}, % of variance", fontsize=10, loc="left")
    write_whole(folder / "models.png", make_picture(picture, axes, "models", "").png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    shares: dict[str, Any] = {}
    for name, one in (("exact", exact), ("cut", cut)):
        random = np.random.default_rng(0)
        runs = [one(random, seed) for seed in range(given.runs)]
        shares[name] = {test: float(np.mean([run[test] for run in runs])) for test in runs[0]}
    content = {"command": shlex.join(["python", *sys.argv]), "runs": given.runs, "seed": 0, "machine": machine(),
               "rejected": shares}  # fmt: skip
    write_whole(given.out / "known.json", (json.dumps(content, indent=1) + "\n").encode())
    figure(given.out)
    print(json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
