"""Rules of decay on a stream of pairs whose world changes: bits a pair.

    python benchmarks/decay.py --out docs/results/decay [--seeds 5] [--steps 12000]

12,000 (key, value) pairs of 32 keys and 16 values; a value is right with probability 0.9, else drawn anew, so that who
knows the map needs 0.815 bits. Before each pair the memory predicts its value by the votes of the pairs with its key,
each weighted by its age, mixed with a tenth of the uniform distribution; before any pair it is uniform.

Regimes: the map stands still; all of it is redrawn once, in the middle; all, or a random half of it, every 2,000 pairs;
one key with probability 0.01 a pair; and, where keys differ, the same half of the keys every 300 pairs.

Rules: one half-life; ADWIN on whether the best guess was right, all votes dropped when it says that this has become
rarer; BOCPD on the same (Beta-Bernoulli, hazard 1/1000), a vote weighing as much as the probability that the run is at
least as old; fixed share over half-lives, for all keys, or for each key apart; `bmojo.memory.decay.Decay`, which learns
both and which to trust, with clusters of random key vectors; and the global weights put into votes by their log-mixture
without norming each half-life's votes ("added to logits").
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmojo.figures import make_picture, new_figure, write_pictures
from bmojo.files import optional_module, write_whole
from bmojo.memory.decay import Decay, DecayPolicy, clusters_of, fixed_share
from bmojo.sweep.report import T95
from bmojo.tables import Cell, Column, Table, markdown
from bmojo.train.machine import machine

KEYS, VALUES, RIGHT, BASE = 32, 16, 0.9, 0.1
FLOOR = -(RIGHT + (1 - RIGHT) / VALUES) * np.log2(RIGHT + (1 - RIGHT) / VALUES) - (VALUES - 1) * (
    1 - RIGHT
) / VALUES * np.log2((1 - RIGHT) / VALUES)
REGIMES = {
    "still": "stationary",
    "once": "one full change",
    "all": "full every 2,000",
    "half": "half every 2,000",
    "gradual": "gradual, 1 % a pair",
    "some": "the same half every 300",
}
POLICY = DecayPolicy()
LIVES = np.array(POLICY.half_lives)
PRIOR = -np.log(len(LIVES))
OURS = "ours: global and clusters"


def draw(regime: str, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [steps] of one stream."""
    random = np.random.default_rng([seed, list(REGIMES).index(regime)])
    keys, noise = random.integers(KEYS, size=steps), random.integers(VALUES, size=steps)
    right, world, values = random.random(steps) < RIGHT, random.integers(VALUES, size=KEYS), np.empty(steps, int)
    for t in range(steps):
        every = {"once": steps // 2, "all": 2000, "half": 2000, "some": 300}.get(regime)
        if regime == "gradual":
            changed = random.integers(KEYS, size=int(random.random() < 0.01))
        elif every is None or t == 0 or t % every:
            changed = np.arange(0)
        else:
            changed = random.permutation(KEYS) if regime == "half" else np.arange(KEYS)
            changed = changed[: KEYS // 2] if regime in ("half", "some") else changed
        world[changed] = random.integers(VALUES, size=len(changed))
        values[t] = world[keys[t]] if right[t] else noise[t]
    return keys, values


def bits(hits: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """-log2 p of the value that came, by the votes for it and all votes."""
    return -np.log2((1 - BASE) * np.where(votes > 0, hits / np.maximum(votes, 1e-300), 1 / VALUES) + BASE / VALUES)


def learned(keys: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Bits [steps, streams] of the rules that are made of half-lives; keys and values [steps, streams]."""
    steps, streams = keys.shape
    votes, fade, row = np.zeros((streams, KEYS, VALUES, len(LIVES))), 2.0 ** (-1 / LIVES), np.arange(streams)
    weights = np.full((streams, len(LIVES)), PRIOR)
    of_key = np.full((streams, KEYS, len(LIVES)), PRIOR)
    losses = np.empty((steps, streams, len(LIVES)))
    rules = {
        name: np.empty((steps, streams)) for name in ("added to logits", "fixed share, global", "fixed share, by key")
    }
    for t, (key, value) in enumerate(zip(keys, values, strict=True)):
        each = votes[row, key]
        losses[t] = bits(each[row, value], each.sum(1))
        mixed = each @ np.exp(weights)[..., None]
        rules["added to logits"][t] = bits(mixed[row, value, 0], mixed.sum((1, 2)))
        weights, rules["fixed share, global"][t] = fixed_share(weights, losses[t], POLICY.share, PRIOR)
        of_key[row, key], rules["fixed share, by key"][t] = fixed_share(
            of_key[row, key], losses[t], POLICY.share, PRIOR
        )
        votes *= fade
        votes[row, key, value] += 1
    rules |= {f"half-life {h:,.0f}" if np.isfinite(h) else "none": losses[..., j] for j, h in enumerate(LIVES)}
    vectors = np.random.default_rng(0).normal(size=(KEYS, 64)).astype(np.float32)
    cluster = clusters_of(vectors, POLICY.clusters)
    ours = [Decay().update(losses[:, n], cluster[keys[:, n]])[1] for n in range(streams)]
    return rules | {OURS: np.stack(ours, 1)}


def adwin(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Bits [steps] of votes that count in full until ADWIN's alarm drops them; keys and values [steps]."""
    detector = optional_module("river.drift", "this rule", "drift").ADWIN()
    votes, spent = np.zeros((KEYS, VALUES)), np.empty(len(keys))
    for t, (key, value) in enumerate(zip(keys, values, strict=True)):
        spent[t] = bits(votes[key, value], votes[key].sum())
        before = detector.estimation
        detector.update(float(votes[key].argmax() == value))
        if detector.drift_detected and detector.estimation < before:  # not when it has learned more
            votes[:] = 0
        votes[key, value] += 1
    return spent


def bocpd(keys: np.ndarray, values: np.ndarray, hazard: float = 1e-3) -> np.ndarray:
    """Bits [steps] of votes that count as probable as it is that nothing has changed since (Adams and MacKay 2007)."""
    spent, past = np.empty(len(keys)), [([], []) for _ in range(KEYS)]
    run, right, wrong = np.ones(1), np.ones(1), np.ones(1)  # P(run length), by length; Beta(1, 1)
    for t, (key, value) in enumerate(zip(keys, values, strict=True)):
        times, seen = (np.array(part, int) for part in past[key])
        survival = np.append(np.cumsum(run[::-1])[::-1], 0)
        weight = survival[np.minimum(t - times, len(survival) - 1)]
        votes = np.bincount(seen, weight, VALUES)
        spent[t] = bits(votes[value], votes.sum())
        hit = votes.argmax() == value
        chance = run * (right if hit else wrong) / (right + wrong)
        run = np.append(hazard * chance.sum(), (1 - hazard) * chance)
        run /= run.sum()
        right, wrong = np.append(1, right + hit), np.append(1, wrong + (not hit))
        likely = len(run) - int(np.argmax(run[::-1] > 1e-12))  # longer runs are given up
        run, right, wrong = run[:likely], right[:likely], wrong[:likely]
        past[key][0].append(t)
        past[key][1].append(value)
    return spent


def measure(steps: int, seeds: int, regimes: list[str], others: bool = True) -> dict[str, np.ndarray]:
    """Bits [regimes, seeds, steps] by rule; `others`: those not made of half-lives, too."""
    streams = [draw(regime, steps, seed) for regime in regimes for seed in range(seeds)]
    keys, values = (np.stack(part, 1) for part in zip(*streams, strict=True))
    rules = learned(keys, values)
    if others:
        rules["ADWIN, flush"] = np.stack([adwin(*stream) for stream in streams], 1)
        rules["BOCPD survival"] = np.stack([bocpd(*stream) for stream in streams], 1)
    return {name: spent.T.reshape(len(regimes), seeds, steps) for name, spent in rules.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    return float(values.mean()), float(T95[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent = measure(options.steps, options.seeds, list(REGIMES))
    order = ["none", *(f"half-life {h:,}" for h in (3000, 1000, 300, 100, 30)), "ADWIN, flush", "BOCPD survival",
             "added to logits", "fixed share, global", "fixed share, by key", OURS]  # fmt: skip
    means = {rule: spent[rule].mean(-1) for rule in order}
    best = {n: min((means[rule][n].mean(), rule) for rule in order)[1] for n in range(len(REGIMES))}
    cells: list[dict[str, Any]] = []
    for n, regime in enumerate(REGIMES):
        for rule in order:
            (mean, wide), (over, over_wide) = interval(means[rule][n]), interval(means[rule][n] - means[best[n]][n])
            cells.append({"regime": regime, "rule": rule, "bits": mean, "ci95": wide, "above_best": over,
                          "above_best_ci95": over_wide, "seeds": means[rule][n].tolist()})  # fmt: skip
    one = np.ones((1, len(LIVES)))
    decay, cluster, times = Decay(), np.zeros(1, int), []
    for _ in range(2000):
        begun = time.perf_counter()
        decay, _ = decay.update(one, cluster)
        times.append(time.perf_counter() - begun)
    report = {
        "command": f"python benchmarks/decay.py --out {options.out} --seeds {options.seeds} --steps {options.steps}",
        "machine": machine(), "seeds": list(range(options.seeds)), "steps": options.steps, "floor": FLOOR,
        "policy": Decay().to_dict()["policy"], "update_microseconds": float(np.median(times) * 1e6), "cells": cells,
    }  # fmt: skip
    columns = []
    for regime, title in REGIMES.items():
        mine = {cell["rule"]: cell for cell in cells if cell["regime"] == regime}
        columns.append(Column(regime, (title,), {
            rule: Cell(c["bits"], f"{c['bits']:.3f} ± {c['ci95']:.3f}", c["bits"] - c["ci95"], c["bits"] + c["ci95"])
            for rule, c in mine.items()}, min))  # fmt: skip
    write_whole(options.out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    table = markdown(Table(order, columns)).replace("| model |", "| rule |")
    write_whole(options.out / "table.md", f"# Rules of decay\n\n{table}\n".encode())
    write_pictures(options.out / "figures", [picture(spent)])
    print(table)


def picture(spent: dict[str, np.ndarray], width: int = 200) -> Any:
    """Bits along the stream, mean of the seeds in windows of `width` pairs."""
    figure, axes = new_figure(len(REGIMES), columns=2)
    colours = {"none": "#000000", "half-life 1,000": "#56B4E9", "half-life 100": "#E69F00", "ADWIN, flush": "#009E73",
               "added to logits": "#CC79A7", OURS: "#D55E00"}  # fmt: skip
    for n, (axis, title) in enumerate(zip(axes, REGIMES.values(), strict=True)):
        for rule, colour in colours.items():
            curve = spent[rule][n].mean(0).reshape(-1, width).mean(1)
            axis.plot(np.arange(1, len(curve) + 1) * width, curve, color=colour, label=rule, linewidth=1.4)
        axis.axhline(FLOOR, color="#555555", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0.7, 4)
        axis.set_ylabel("bits a pair")
        axis.set_xlabel("pairs")
    return make_picture(figure, axes, "bits", "Bits a pair along the stream; dashed: who knows the map.")


if __name__ == "__main__":
    main()
