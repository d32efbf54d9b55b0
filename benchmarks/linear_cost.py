"""Is the cost of a model linear in the length? Training step and decoding by length, for every preset at size tiny.

    python benchmarks/linear_cost.py --out benchmarks/results/linear_cost.json [--threads N]

Lengths are timed in turn, round after round, so that a machine that slows down slows all of them: only the ratios
count. Exits with 1 if bmojo breaks one of the bars in BARS, or its state grows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmojo import BMojoLM, presets
from bmojo.eval import decode_cost
from bmojo.files import write_whole
from bmojo.train import next_token_loss
from bmojo.train.machine import machine

LENGTHS = [1024, 2048, 4096]
CONTEXTS = [1024, 32768]
BARS = {"train_ratio": 4.6, "decode_ratio": 1.1}  # time at the last length over time at the first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15, help="of training steps, at every length")
    parser.add_argument("--decode-rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    load = [os.getloadavg()]
    models = {}
    for name in presets.PRESETS:
        torch.manual_seed(0)
        model = BMojoLM(presets.matched(name, "tiny"))
        models[name] = measure_training(model, options.rounds) | measure_decoding(model, options.decode_rounds)
        print(f"measured {name}", file=sys.stderr)
    load.append(os.getloadavg())

    broken = broken_bars(models)
    report = {
        "size": "tiny",
        "batch": 1,
        "rounds": options.rounds,
        "decode_rounds": options.decode_rounds,
        "bars": BARS,
        "broken": broken,
        "machine": {**machine(), "cores": os.cpu_count(), "load_before_and_after": load},
        "models": models,
    }
    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
    print_table(models)
    print("\n".join(broken) or "bmojo keeps all bars")
    return 1 if broken else 0


def measure_training(model: BMojoLM, rounds: int) -> dict[str, Any]:
    """Seconds of loss and gradients at each length."""
    tokens = torch.randint(model.config.vocab_size, (1, LENGTHS[-1] + 1), generator=torch.Generator().manual_seed(0))
    seconds: list[list[float]] = []
    for _ in range(rounds + 1):  # the first one warms up
        seconds.append([])
        for length in LENGTHS:
            batch = {"tokens": tokens[:, :length], "labels": tokens[:, 1 : length + 1]}
            started = time.perf_counter()
            next_token_loss(model, batch).backward()
            seconds[-1].append(time.perf_counter() - started)
            model.zero_grad()
    times = {length: spread(column) for length, column in zip(LENGTHS, zip(*seconds[1:], strict=True), strict=True)}
    return {"train_seconds": times, "train_ratio": times[LENGTHS[-1]]["median"] / times[LENGTHS[0]]["median"]}


def measure_decoding(model: BMojoLM, rounds: int) -> dict[str, Any]:
    """Milliseconds a token, and bytes of state, at each context."""
    costs = [decode_cost(model, CONTEXTS, tokens_per_context=64) for _ in range(rounds)]
    times = {
        context: spread([cost["ms_per_token"] for cost in column])
        for context, column in zip(CONTEXTS, zip(*costs, strict=True), strict=True)
    }
    return {
        "decode_ms": times,
        "decode_ratio": times[CONTEXTS[-1]]["median"] / times[CONTEXTS[0]]["median"],
        "state_bytes": {cost["context"]: cost["state_bytes"] for cost in costs[0]},
    }


def spread(times: Any) -> dict[str, float]:
    return dict(
        zip(("low_quartile", "median", "high_quartile"), np.percentile(times, [25, 50, 75]).tolist(), strict=True)
    )


def broken_bars(models: dict[str, Any]) -> list[str]:
    bmojo = models["bmojo"]
    broken = [f"bmojo: {bar} is {bmojo[bar]:.2f}, above {most}" for bar, most in BARS.items() if bmojo[bar] > most]
    for name, model in models.items():
        if name != "transformer" and len(set(model["state_bytes"].values())) > 1:
            broken.append(f"{name}: the state grows: {model['state_bytes']}")
    return broken


def print_table(models: dict[str, Any]) -> None:
    heads = ["model", *(f"train ms {n}" for n in LENGTHS), "ratio", *(f"decode ms {n}" for n in CONTEXTS), "ratio"]
    rows = [[*heads, *(f"state {n}" for n in CONTEXTS)]]
    for name, model in models.items():
        train = [f"{1000 * times['median']:.0f}" for times in model["train_seconds"].values()]
        decode = [f"{times['median']:.2f}" for times in model["decode_ms"].values()]
        ratios = [f"{model[bar]:.2f}" for bar in BARS]
        rows.append([name, *train, ratios[0], *decode, ratios[1], *map(str, model["state_bytes"].values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
