"""Solomonoff's mixture on 16-bit strings: the figures of the reference, what they cost, and programs found by search.

    python benchmarks/solomonoff.py --out docs/results/solomonoff [--threads 2]

Builds the tables of depth 8 to 13 of both machines (16 bits, 1,024 steps), each by itself, and sets what they say
beside what an implementation of its own measured before (`EXPECTED`; see docs/universal.md).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.figures import write_pictures
from bmojo.files import write_whole
from bmojo.train.machine import machine
from bmojo.universal import CTW, KT, SolomonoffTable, levin_search, speed_prior
from bmojo.universal.gap import Uniform, solomonoff_gap
from bmojo.universal.plot import table_picture

BITS, STEPS, DEPTHS = 16, 1024, range(8, 14)
EXPECTED = {
    "entropy": 5.22,
    "gap of uniform": 10.78,
    "gap of KT": 4.61,
    "gap of CTW, depth 4": 2.77,
    "gap of CTW, depth 8": 2.80,
    "M(all ones)": 1.3e-2,
    "M(all zeros)": 4.5e-3,
    "M(0 and ones)": 4.4e-3,
    "M(0101...)": 6.4e-4,
    "8-bit strings printed, D = 12": 250,
    "10-bit strings printed, D = 12": 635,
    "12-bit strings printed, D = 12": 936,
    "16-bit strings printed, D = 13": 3233,
    "KL(bp7 || bp6)": 0.09,
    **{f"KL(D = 13 || D = {d})": kl for d, kl in zip(DEPTHS, (2.80, 1.28, 0.47, 0.12, 0.021), strict=False)},
    "KL(D = 13 || D = 8), completed": 0.036,
    "KL(D = 13 || D = 12), completed": 0.0011,
    "completed, D = 13, from uniform": 0.36,
    "undecided, D = 13": 0.88,
    "programs, D = 8": 6.5e6,
    "programs, D = 10": 308e6,
}
DATA = ("0", "1", "1" * 16, "01" * 8, "001" * 5, "0110100110010110")


def completed(table: SolomonoffTable) -> np.ndarray:
    """Programs that were cut off print fair coins from there on: a measure, given that a program does not loop."""
    undecided = np.zeros(1)
    for t in range(BITS):
        index = np.arange(1 << t, 2 << t)
        first = table.counts.first.astype(np.float64)
        undecided += first[index] - first[2 * index] - first[2 * index + 1] - table.counts.loops[index]
        undecided = np.repeat(undecided / 2, 2)
    measure = table.levels()[BITS] + undecided
    return measure / measure.sum()


def programs(tables: dict[int, SolomonoffTable], depth: int) -> int:
    """Nodes that a walk of all programs one by one visits: A for each that still runs at a lower depth."""
    running = [tables[d].counts.depth if d else 1 for d in range(depth)]
    return sum(running) * tables[depth].size


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log2(p / q)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    SolomonoffTable.build("bp7", BITS, 4)  # compiles
    tables: dict[str, dict[int, SolomonoffTable]] = {}
    builds: list[dict[str, Any]] = []
    for name in ("bp7", "bp6"):
        for depth in range(1, max(DEPTHS) + 1):
            nodes: list[int] = [0]
            wall, cpu = time.perf_counter(), time.process_time()
            table = SolomonoffTable.build(
                name,
                BITS,
                depth,
                STEPS,
                threads=arguments.threads,
                progress=lambda _, n, nodes=nodes: nodes.append(n),
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            tables.setdefault(name, {})[depth] = table
            mass = {kind: count / table.total for kind, count in table.mass().items()}
            cost = {"nodes": nodes[-1], "wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}
            builds.append({"machine": name, "depth": depth, **cost, "load": os.getloadavg()[0], "mass": mass})
            print(builds[-1], flush=True)
    bp7 = tables["bp7"]
    full = bp7[13]
    measured = {
        "entropy": full.entropy(),
        "gap of uniform": solomonoff_gap(Uniform(), full).total,
        "gap of KT": solomonoff_gap(KT(), full).total,
        "gap of CTW, depth 4": solomonoff_gap(CTW(4), full).total,
        "gap of CTW, depth 8": solomonoff_gap(CTW(8), full).total,
        **{
            f"M({what})": full.count(x) / full.total
            for what, x in (
                ("all ones", "1" * 16),
                ("all zeros", "0" * 16),
                ("0 and ones", "0" + "1" * 15),
                ("0101...", "01" * 8),
            )
        },
        **{f"{t}-bit strings printed, D = 12": bp7[12].coverage()[t] for t in (8, 10, 12)},
        "16-bit strings printed, D = 13": full.coverage()[16],
        "KL(bp7 || bp6)": full.divergence(tables["bp6"][13]),
        **{f"KL(D = 13 || D = {d})": full.divergence(bp7[d]) for d in DEPTHS if d < 13},
        **{f"KL(D = 13 || D = {d}), completed": kl(completed(full), completed(bp7[d])) for d in (8, 12)},
        "completed, D = 13, from uniform": kl(completed(full), np.full(1 << BITS, 2.0**-BITS)),
        "undecided, D = 13": (full.counts.depth + int(full.counts.timeouts.sum())) / full.total,
        **{f"programs, D = {d}": programs(bp7, d) for d in (8, 10)},
    }
    speed = speed_prior(BITS, 24)
    found = []
    for data in DATA:
        begin = time.perf_counter()
        search = levin_search(data, max_phase=30)
        cost = {"phase": search.phase, "spent": search.spent, "seconds": round(time.perf_counter() - begin, 3)}
        hit = {"program": search.program, "steps": search.steps, "kt": search.kt if search.program else None}
        mixture = full.count(data) / full.total
        found.append({"data": data, **hit, **cost, "M": mixture, "speed_prior": speed.bounds(data)})
        print(found[-1], flush=True)
    results = {
        "command": f"python benchmarks/solomonoff.py --out {arguments.out} --threads {arguments.threads}",
        "machine": machine(),
        "bits": BITS,
        "steps": STEPS,
        "measured": measured,
        "expected": EXPECTED,
        "builds": builds,
        "search": found,
    }
    write_whole(arguments.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_pictures(arguments.out, [table_picture([bp7[d] for d in DEPTHS])])
    for name, value in measured.items():
        print(f"{name:36} {value:14.6g} {EXPECTED[name]:14.6g}")


if __name__ == "__main__":
    main()
