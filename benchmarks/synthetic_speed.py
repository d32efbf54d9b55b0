"""How fast every synthetic task is drawn: 100,000 examples of 512 tokens, on one core.

    python benchmarks/synthetic_speed.py --out benchmarks/results/synthetic_speed.json

Exits with 1 if a task takes more than BAR seconds, by the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.data.synthetic import TASKS, ZOOLOGY, make_task
from bmojo.files import write_whole
from bmojo.train.machine import cpu_name

EXAMPLES, ROWS, LENGTH = 100_000, 1000, 512
BAR = 10.0
TIMED: list[dict[str, Any]] = [
    *({"name": "mqar", **ZOOLOGY[-1], "filler": filler} for filler in ("constant", "alphabet", "text", "noise")),
    {"name": "mqar", **ZOOLOGY[-1], "gap": 64, "spread": True},
    *({"name": name, "length": LENGTH} for name in TASKS if name != "mqar"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    machine = {"cpu": cpu_name(), "numpy": np.__version__, "python": sys.version.split()[0]}
    results = [{"task": task, "seconds": round(seconds(task), 2)} for task in TIMED]
    report = {"examples": EXAMPLES, "rows a batch": ROWS, "bar": BAR, "machine": machine, "results": results}
    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
    for result in results:
        print(f"{result['seconds']:6.2f} s  {result['task']}")
    return int(any(result["seconds"] > BAR for result in results))


def seconds(record: dict[str, Any]) -> float:
    """The time to draw them all, without the text being read, which happens once a process."""
    task = make_task(**record)
    task.batch(0, 1)
    start = time.perf_counter()
    for number in range(EXAMPLES // ROWS):
        task.batch(number, ROWS)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
