"""What each choice of the layer costs: training tokens a second and decode milliseconds, as ratios to the default.

    python benchmarks/choice_cost.py --out benchmarks/results/choice_cost.json [--threads N]

`bmojo` at size tiny, equal parameters, rows of 1024 tokens. The choices are timed in turn, round after round, so that a
machine that slows down slows all of them; a ratio is the median over the rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from linear_cost import spread

from bmojo import BMojoLM, presets
from bmojo.eval import decode_cost
from bmojo.files import write_whole
from bmojo.train import next_token_loss
from bmojo.train.machine import machine

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "admission by innovation": {"admission": "innovation"},
    "innovation ema": {"innovation": "ema"},
    "innovation state": {"innovation": "state"},
    "innovation head": {"innovation": "head"},
    "innovation recent": {"innovation": "recent"},
    "no eidetic slots": {"eidetic_slots": 0},
    "twice the slots": {"eidetic_slots": 64},
    "true positions": {"positions": "true"},
    "fading summary": {"fading": "summary"},
    "no fading memory": {"fading_span": 0},
    "untied sources": {"tie_sources": False},
    "window 128": {"window": 128},
    "no key convolution": {"conv_size": 0},
    "ssm gdn": {"ssm": "gdn", "ssm_groups": 4},
}
LENGTH, BATCH, CONTEXT = 1024, 2, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {}
    for name, changes in CHOICES.items():
        torch.manual_seed(0)
        models[name] = BMojoLM(presets.matched("bmojo", "tiny", **changes))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds + 1):  # the first one warms up
        for name, model in models.items():
            seconds[name].append(train_step(model))
            decode[name].append(decode_cost(model, [CONTEXT], tokens_per_context=32)[0]["ms_per_token"])
    report = {
        "length": LENGTH,
        "batch": BATCH,
        "rounds": options.rounds,
        "machine": machine(),
        "choices": {
            name: {
                "train_tokens_per_second": BATCH * LENGTH / spread(seconds[name][1:])["median"],
                "train_time_ratio": ratio(seconds[name], seconds["default"]),
                "decode_ms": spread(decode[name][1:])["median"],
                "decode_ratio": ratio(decode[name], decode["default"]),
                "state_bytes": presets.state_bytes(model.config),
            }
            for name, model in models.items()
        },
    }
    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
    for name, cost in report["choices"].items():
        train, token = cost["train_time_ratio"]["median"], cost["decode_ratio"]["median"]
        print(f"{name:26} training time {train:.2f}, decoding {token:.2f}, {cost['state_bytes']:,} bytes of state")


def train_step(model: BMojoLM) -> float:
    """Seconds of loss and gradients."""
    tokens = torch.randint(model.config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    next_token_loss(model, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}).backward()
    model.zero_grad()
    return time.perf_counter() - started


def ratio(times: list[float], default: list[float]) -> dict[str, float]:
    """Of the same round, without the first."""
    return spread([a / b for a, b in zip(times[1:], default[1:], strict=True)])


if __name__ == "__main__":
    main()
