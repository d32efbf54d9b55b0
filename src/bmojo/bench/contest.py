"""How things are timed against each other.

All contestants of a cell run once a round, each round begun by another of them, so that a machine that slows down slows
all of them; a ratio is taken within a round, to the first contestant. Medians and quartiles are over the rounds.
Before the rounds each runs twice: the first run pays for what is done once (compiling, too), the second is watched for
its memory. Python's collector is off in the rounds.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bmojo.bench.floor import Rates, Work
from bmojo.train.memory import memory_bytes, peak_memory_bytes, reset_peak_memory

Timer = Callable[[Callable[[], Any]], float]  # seconds that a call takes


class Missing(Exception):
    """Why a contestant can't run here: a package or a device that is not there."""


@dataclass
class Runner:
    """A contestant that is built. `run` is timed; `prepare`, called before each run, is not."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    parameters: int | None = None
    state_bytes: int | None = None


@dataclass(frozen=True)
class Contestant:
    """`make` builds it, or raises Missing. A run works through `tokens` tokens, for which at least `work` must be done
    (None: not counted). `rival`: of another library. `compiled`: its first run compiles."""

    name: str
    make: Callable[[], Runner]
    tokens: int
    work: Work | None = None
    rival: bool = False
    compiled: bool = False


def stopwatch(device: str) -> Timer:
    """A clock for calls on the device: CUDA's own events, or the clock on the wall."""
    return _cuda_seconds if device == "cuda" else _wall_seconds


def _wall_seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low_quartile": low, "high_quartile": high}


def race(contestants: Sequence[Contestant], rounds: int, timer: Timer, rates: Rates) -> dict[str, Any]:
    """`entries` of those that ran, and `absent`: why the others did not, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries find to say of their own code
        warnings.filterwarnings("default", module="bmojo")
        gc.collect()
        gc.freeze()  # what was there is not looked through again each time that memory is watched
        try:
            built, absent = _build(contestants, timer)
            times: dict[str, list[float]] = {name: [] for name in built}
            names = list(built)
            gc.disable()
            for first in range(rounds):
                for name in (*names[first % len(names) :], *names[: first % len(names)]) if names else ():
                    times[name].append(_timed(built[name][0], timer))
        finally:
            gc.enable()
            gc.unfreeze()
    reference = times.get(contestants[0].name)
    entries = []
    for contestant in contestants:
        if contestant.name in built:
            runner, first_seconds, memory = built[contestant.name]
            seconds = times[contestant.name]
            entry = _entry(contestant, runner, seconds, memory, rates)
            if contestant.compiled:
                entry["compile_seconds"] = first_seconds
            if reference is not None:
                entry["ratio"] = spread([mine / theirs for mine, theirs in zip(seconds, reference, strict=True)])
            entries.append(entry)
    return {"rounds": rounds, "entries": entries, "absent": absent}


def _build(
    contestants: Sequence[Contestant], timer: Timer
) -> tuple[dict[str, tuple[Runner, float, int | None]], dict[str, str]]:
    """Every contestant with the seconds of its first run and the memory of its second, and who is absent."""
    built, absent = {}, {}
    for contestant in contestants:
        try:
            runner = contestant.make()
            first = _timed(runner, timer)
            built[contestant.name] = runner, first, _memory(runner)
        except Missing as reason:
            absent[contestant.name] = str(reason)
        except torch.OutOfMemoryError:
            absent[contestant.name] = "out of memory"
        except Exception as error:
            if not contestant.rival:
                raise
            first_line = str(error).strip().partition("\n")[0][:200]
            absent[contestant.name] = f"failed: {type(error).__name__}: {first_line}"
    return built, absent


def _timed(runner: Runner, timer: Timer) -> float:
    if runner.prepare is not None:
        runner.prepare()
    return timer(runner.run)


def _memory(runner: Runner) -> int | None:
    """Bytes that a run holds at most beyond those held before it; None where the system does not tell."""
    if runner.prepare is not None:
        runner.prepare()
    reset_peak_memory()
    before = memory_bytes()
    runner.run()
    return None if before is None else max(0, peak_memory_bytes() - before)


def _entry(
    contestant: Contestant, runner: Runner, seconds: Sequence[float], memory: int | None, rates: Rates
) -> dict[str, Any]:
    took = spread(seconds)
    entry: dict[str, Any] = {
        "name": contestant.name,
        "rival": contestant.rival,
        "tokens": contestant.tokens,
        "seconds": took,
        "tokens_per_second": contestant.tokens / took["median"],
        "peak_memory_bytes": memory,
    }
    if runner.parameters is not None:
        entry["parameters"] = runner.parameters
    if runner.state_bytes is not None:
        entry["state_bytes"] = runner.state_bytes
    if contestant.work is not None:
        floor = rates.seconds(contestant.work)
        entry |= {"flops": contestant.work.flops, "bytes": contestant.work.bytes, "floor_share": floor / took["median"]}
    return entry
