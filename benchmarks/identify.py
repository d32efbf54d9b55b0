"""Canonical variate analysis against SLICOT's N4SID: what predicting with each costs over the true Kalman filter.

    python benchmarks/identify.py --out docs/results/identify [--systems 10] [--seeds 5]

Random systems of 4 states and 3 outputs (0, 1 or 2 pairs of complex poles, moduli below 0.95, 7 noises), each simulated
with several seeds. Both methods see the same samples and are told the order; N4SID (IB01AD, IB01BD by way of ctrlsys)
once for each of 6, 10 and 15 block rows, with its own Kalman gain. The cost is `LTI.excess`: log det of the covariance
of one-step errors less that of the best, computed without samples. A model with 2 n p = 24 numbers that are estimated
as well as they can be costs about 24 / N.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.figures import Picture, make_picture, new_figure, write_pictures
from bmojo.files import write_whole
from bmojo.realize import cva
from bmojo.train.machine import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/reference"))
from n4sid import n4sid, predictor_excess
from systems import stable

LENGTHS = (2_000, 20_000)
ROWS = (6, 10, 15)
STATES, OUTPUTS = 4, 3
OURS = "cva"


def measure(systems: int, seeds: int) -> list[dict[str, Any]]:
    cells = []
    for system in range(systems):
        truth = stable(system, STATES, OUTPUTS, STATES + OUTPUTS, pairs=system % 3)
        for seed in range(seeds):
            for length in LENGTHS:
                y = truth.simulate(length, 1000 * system + seed)
                times, excess = {}, {}
                begun = time.process_time()
                model = cva(y, STATES)
                times[OURS], excess[OURS] = time.process_time() - begun, truth.excess(model)
                for rows in ROWS:
                    begun = time.process_time()
                    found = n4sid(y, STATES, rows)
                    name = f"n4sid, {rows} block rows"
                    times[name], excess[name] = time.process_time() - begun, predictor_excess(truth, *found)
                free = cva(y)
                excess["cva, order by AIC"] = truth.excess(free)
                cells.append({"system": system, "seed": seed, "samples": length, "excess": excess, "seconds": times,
                              "order": free.sizes[0]})  # fmt: skip
    return cells


def summary(cells: list[dict[str, Any]], samples: int) -> dict[str, dict[str, float]]:
    """By method: mean, median, largest, in how many data sets ours is lower, and CPU seconds (medians)."""
    mine = [cell for cell in cells if cell["samples"] == samples]
    ours = np.array([cell["excess"][OURS] for cell in mine])
    table = {}
    for name in mine[0]["excess"]:
        values = np.array([cell["excess"][name] for cell in mine])
        seconds = [cell["seconds"][name] for cell in mine if name in cell["seconds"]]
        table[name] = {
            "mean": float(values.mean()), "median": float(np.median(values)), "largest": float(values.max()),
            "ours_lower": int((ours < values).sum()), "of": len(mine),
            "seconds": float(np.median(seconds)) if seconds else None,
        }  # fmt: skip
    return table


def picture(cells: list[dict[str, Any]]) -> Picture:
    figure, axes = new_figure(len(LENGTHS))
    for axis, samples in zip(axes, LENGTHS, strict=True):
        mine = [cell for cell in cells if cell["samples"] == samples]
        x = [cell["excess"][OURS] for cell in mine]
        for rows, colour, marker in zip(ROWS, ("#0072B2", "#E69F00", "#009E73"), "osv", strict=True):
            y = [cell["excess"][f"n4sid, {rows} block rows"] for cell in mine]
            axis.plot(x, y, marker, color=colour, markersize=4, label=f"{rows} block rows")
        ends = [min(x) / 1.5, max(x) * 1.5]
        axis.plot(ends, ends, color="#777777", linewidth=1)
        axis.axvline(2 * STATES * OUTPUTS / samples, color="#777777", linewidth=1, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="excess of cva", ylabel="excess of N4SID",
                 title=f"{samples:,} samples")  # fmt: skip
        ticks = [count / samples for count in (10, 20, 40)]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.tick_params(axis="x", which="minor", labelbottom=False)
    caption = (
        "Excess log det of one-step errors, one point a data set: above the line cva predicts better; dotted 2np/N"
    )
    return make_picture(figure, axes, "identify", caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--systems", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    cells = measure(options.systems, options.seeds)
    table = {str(samples): summary(cells, samples) for samples in LENGTHS}
    flags = f"--systems {options.systems} --seeds {options.seeds}"
    report = {
        "command": f"python benchmarks/identify.py --out {options.out} {flags}",
        "machine": machine(), "states": STATES, "outputs": OUTPUTS, "summary": table, "cells": cells,
    }  # fmt: skip
    write_whole(options.out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    write_pictures(options.out / "figures", [picture(cells)])
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
