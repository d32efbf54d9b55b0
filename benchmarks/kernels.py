"""What each C++ kernel is worth: training and decoding with one of them at a time replaced by plain PyTorch.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

Ratios are times without the kernel over times with all of them, in the same round; medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bmojo import BMojoLM, presets
from bmojo.bench.contest import Contestant, Runner, race, stopwatch
from bmojo.bench.floor import measure_rates
from bmojo.files import write_whole
from bmojo.nn.decoder import Decoder
from bmojo.ops import dispatch
from bmojo.train import next_token_loss
from bmojo.train.machine import machine

PRESETS = ("bmojo", "mamba2", "gdn", "mamba", "transformer")
LENGTHS, BATCH, CONTEXT, TOKENS = (512, 2048), 2, 1024, 64
ALL = "all kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates, cells = measure_rates(stopwatch("cpu"), "cpu", torch.float32), []
    for name in PRESETS:
        torch.manual_seed(0)
        model = BMojoLM(presets.get(name, "tiny"))
        for length in LENGTHS:
            cells.append({"preset": name, "pass": "train", "time": length, "batch": BATCH})
            cells[-1] |= compare(training(model, length), BATCH * length, options.rounds, rates)
        cells.append({"preset": name, "pass": "decode", "context": CONTEXT})
        cells[-1] |= compare(decoding(model), TOKENS, options.rounds, rates)
        for cell in cells[-len(LENGTHS) - 1 :]:
            for entry in cell["entries"]:
                where = cell.get("time", cell.get("context"))
                print(f"{name:12} {cell['pass']:6} {where:5} {entry['name']:32} {entry['ratio']['median']:.2f}")
    report = {"machine": machine(), "threads": options.threads, "size": "tiny", "cells": cells}
    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())


def compare(run: Callable[[], Any], tokens: int, rounds: int, rates: Any) -> dict[str, Any]:
    """A race of `run` with all kernels that it uses against itself without one of them, and without any."""
    used = kernels_of(run)
    contestants = [Contestant(ALL, lambda: Runner(run), tokens)]
    for path in used:
        name = f"without {path.split(':')[1]}"
        contestants.append(Contestant(name, lambda path=path: Runner(without(run, {path})), tokens))
    contestants.append(Contestant("without any", lambda: Runner(without(run, set(used))), tokens))
    return race(contestants, rounds, stopwatch("cpu"), rates)


def kernels_of(run: Callable[[], Any]) -> list[str]:
    """The kernels that a call asks for, as "module:function"."""
    before = dict(dispatch._kernels)
    dispatch._kernels.clear()
    run()
    used = [path for path, kernel in dispatch._kernels.items() if kernel is not None]
    dispatch._kernels.update(before)
    return used


def without(run: Callable[[], Any], paths: set[str]) -> Callable[[], Any]:
    def other() -> None:
        with off(paths):
            run()

    return other


@contextmanager
def off(paths: set[str]) -> Iterator[None]:
    kernels = {path: dispatch._kernels[path] for path in paths}
    dispatch._kernels.update(dict.fromkeys(paths))
    try:
        yield
    finally:
        dispatch._kernels.update(kernels)


def training(model: BMojoLM, length: int) -> Callable[[], None]:
    """Loss and gradients."""
    tokens = torch.randint(model.config.vocab_size, (BATCH, length + 1), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        next_token_loss(model, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}).backward()
        model.zero_grad()

    return run


def decoding(model: BMojoLM) -> Callable[[], None]:
    """So many tokens one after the other, from the same state."""
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        _, state = model.features(torch.randint(model.config.vocab_size, (1, CONTEXT), generator=draw))
    tokens = torch.randint(model.config.vocab_size, (TOKENS, 1), generator=draw)

    def run() -> None:
        with torch.inference_mode():
            decoder = Decoder(model, state)
            for token in tokens:
                decoder(token)

    return run


if __name__ == "__main__":
    main()
