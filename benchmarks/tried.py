"""Ideas for CPUs that were measured and left alone.

    python benchmarks/tried.py --out benchmarks/results/tried.json

Projections of one input in one product or apart (forward + backward); products in bfloat16; `torch.compile` of whole
models (training step), with the seconds that compiling takes. Ratios are another's time over the first one's in the
same round; medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bmojo import BMojoLM, presets
from bmojo.bench.contest import Contestant, Runner, race, stopwatch
from bmojo.bench.floor import measure_rates
from bmojo.files import write_whole
from bmojo.train import next_token_loss
from bmojo.train.machine import machine

ROWS, HIDDEN = 4096, (128, 256)
COMPILED, LENGTH, BATCH = ("bmojo",), 1024, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates, cells = measure_rates(stopwatch("cpu"), "cpu", torch.float32), []

    def run(what: str, contestants: dict[str, Callable[[], Any]], compiled: str | None = None, **settings: Any) -> None:
        rivals = [Contestant(name, lambda one=one: Runner(one), ROWS, compiled=name == compiled)
                  for name, one in contestants.items()]  # fmt: skip
        cells.append({"what": what, **settings, **race(rivals, options.rounds, stopwatch("cpu"), rates)})
        for entry in cells[-1]["entries"]:
            compiling = f", compiling {entry['compile_seconds']:.0f} s" if "compile_seconds" in entry else ""
            print(f"{what} {settings}: {entry['name']} {entry['ratio']['median']:.2f}{compiling}")

    for hidden in HIDDEN:
        run("projections", {"apart": projections(hidden, True), "in one product": projections(hidden, False)},
            hidden=hidden)  # fmt: skip
    run("products", {"float32": product(torch.float32), "bfloat16": product(torch.bfloat16)}, size=256)
    for name in COMPILED:
        torch.manual_seed(0)
        model = BMojoLM(presets.get(name, "tiny"))
        run(
            "torch.compile",
            {"eager": training(model), "compiled": training(model, torch.compile(next_token_loss))},
            "compiled",
            preset=name,
        )
    report = {"machine": machine(), "threads": options.threads, "cells": cells}
    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())


def projections(hidden: int, apart: bool) -> Callable[[], None]:
    """Those of a bmojo layer's input: queries, values, and the SSM's z, x, B, C, dt."""
    draw = torch.Generator().manual_seed(0)
    sizes = (hidden, hidden, 2 * hidden + 36)
    x = torch.randn(ROWS, hidden, generator=draw, requires_grad=True)
    weights = [torch.randn(size, hidden, generator=draw, requires_grad=True) for size in sizes]

    def run() -> None:
        if apart:
            parts = [torch.nn.functional.linear(x, weight) for weight in weights]
        else:
            parts = list(torch.nn.functional.linear(x, torch.cat(weights)).split(sizes, -1))
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
        for z in (x, *weights):
            z.grad = None

    return run


def product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda: a @ a


def training(model: BMojoLM, loss: Callable[..., torch.Tensor] = next_token_loss) -> Callable[[], None]:
    tokens = torch.randint(model.config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        loss(model, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}).backward()
        model.zero_grad()

    return run


if __name__ == "__main__":
    main()
