"""A run of benchmarks in a folder: results.json, written whole after each cell. Cells that are there are not measured
again, so that an interrupted run goes on and a run with more values adds to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bmojo
from bmojo.bench.cases import Cell, Plan
from bmojo.bench.contest import Timer, race, stopwatch
from bmojo.bench.floor import Rates, measure_rates
from bmojo.bench.rivals import versions
from bmojo.bench.stream import stream_growth
from bmojo.errors import CheckpointError
from bmojo.files import full_disk_told
from bmojo.schema import check_schema, read_json, write_json
from bmojo.train.machine import machine

RESULTS = "results.json"
Results = dict[str, Any]


def read_results(folder: Path) -> Results:
    """The valid results in a folder of `bmojo bench`, or in the file itself."""
    path = folder / RESULTS if folder.is_dir() else folder
    results = read_json(path)
    check_schema(results, "bmojo.bench")
    return results


def made_here(command: str) -> Results:
    """Results of no cell yet."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "version": 1,
        "created": _now(),
        "command": command,
        "bmojo": bmojo.__version__,
        "machine": {**machine(), "cores": cores},
        "packages": versions(),
        "cells": [],
    }


def go_on(results: Results, folder: Path) -> Results:
    """What is in the folder, or else `results`. Raises CheckpointError if it was made elsewhere."""
    if not (folder / RESULTS).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} holds something that is no benchmark; use another --out")
        return results
    before = read_results(folder)
    facts = [("bmojo", before["bmojo"], results["bmojo"])]
    for part in ("machine", "packages"):
        names = sorted(before[part] | results[part])
        facts += [(name, before[part].get(name), results[part].get(name)) for name in names]
    for name, then, now in facts:
        if then != now:
            raise CheckpointError(
                f"the results in {folder} are of another machine or version: {name} was {_told(then)}, it is "
                f"{_told(now)} here; timings don't mix: use another --out, or make it the same again"
            )
    return before


def run(
    plan: Plan, folder: Path, command: str, rounds: int, tell: Callable[[str], None], timer: Timer | None = None
) -> Results:
    """Measure the cells of the plan that are not in the folder; `tell` gets a line for each."""
    results = go_on(made_here(command), folder)
    timer = timer or stopwatch(plan.device)
    rates: Rates | None = None
    with full_disk_told(folder):
        for cell in missing(plan, results):
            rates = rates or measure_rates(timer, plan.device, plan.torch_dtype)
            found = measure(cell, rounds, timer, rates, plan)
            results["cells"].append(found)
            results |= {"created": _now(), "command": command}
            check_schema(results, "bmojo.bench")
            write_json(folder / RESULTS, results)
            tell(line(cell, found))
    return results


def missing(plan: Plan, results: Results) -> Iterator[Cell]:
    """The cells of the plan that are not among the results."""
    for cell in plan.cells():
        key = (cell.suite, cell.case, cell.settings)
        if key not in ((c["suite"], c["case"], c["settings"]) for c in results["cells"]):
            yield cell


def measure(cell: Cell, rounds: int, timer: Timer, rates: Rates, plan: Plan) -> dict[str, Any]:
    """The cell's entry in the results."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about: Results = {"suite": cell.suite, "case": cell.case, "settings": cell.settings}
    about |= {"rates": rates._asdict(), "load": load}
    if cell.stream is not None:
        return about | {"stream": stream_growth(cell.stream, cell.settings["tokens"], plan.device)}
    return about | race(cell.contestants, rounds, timer, rates)


def line(cell: Cell, found: dict[str, Any]) -> str:
    """What a cell came to."""
    if "stream" in found:
        growth = found["stream"]["growth_bytes"]
        return f"{cell.name}: {'too short to tell' if growth is None else f'grew by {growth / 1e6:.1f} MB'}"
    parts = [
        f"{e['name']} {1000 * e['seconds']['median']:.3g} ms"
        + (f" (x{e['ratio']['median']:.2f})" if "ratio" in e else "")
        for e in found["entries"]
    ]
    return f"{cell.name}: {', '.join([*parts, *(f'{name}: {why}' for name, why in found['absent'].items())])}"


def _told(value: Any) -> str:
    return "not installed" if value is None else repr(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
