"""Look-ups in real text far beyond any window: a store inside the layer, against none, plain retrieval, full attention.

    python benchmarks/long_memory.py train --out runs/long          # three small models, about an hour on one core
    python benchmarks/long_memory.py ask --models runs/long --out docs/results/storage --lengths 65536,1048576
    python benchmarks/long_memory.py draw --out docs/results/storage

`train`: `base` learns look-ups with full attention in rows of 256 bytes; from it come, with as many further steps,
`stored` (window 64, eidetic slots, and a store that is trained with the blocks of the other rows as distractors) and
`full` (full attention). Each of them goes on where it was stopped.

`ask`: of one haystack a form, length and seed, read once: every question, by each way of remembering. Results are
written after each, and what is there is not measured again; full attention is asked up to FULL_LENGTH.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bmojo import BMojoLM, presets
from bmojo.data.synthetic.lookup import FORMS, Lookup
from bmojo.eval.long import Method, Neighbours, Retrieved, Stored, Streamed, ask
from bmojo.figures import draw, make_picture, new_figure, token_axis, write_pictures
from bmojo.files import write_whole
from bmojo.memory.storage import Storage
from bmojo.memory.store import Store
from bmojo.train import TrainSettings, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows

STRIDES = (4, 16, 64)
FULL_LENGTH = 16384
BASE = {
    "vocab_size": 256, "num_layers": 3, "hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    "intermediate_size": 128, "conv_size": 4, "rope_theta": 1000.0, "ssm_head_dim": 16, "ssm_conv": 12,
    "pattern": ["ssm", "attention", "attention"],
}  # fmt: skip
STORED = {
    "pattern": ["ssm", "bmojo", "bmojo"], "window": 64, "eidetic_slots": 32, "storage_layers": [-1],
    "storage_keys": 8,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["train", "ask", "draw"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="the folder that `train` wrote")
    parser.add_argument("--lengths", default="4096,16384,65536,262144,1048576")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--facts", type=int, default=128, help="facts in a haystack, each of which is asked for")
    parser.add_argument("--numbers", default="0", help="haystacks of each form and length, by number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.do == "train":
        train_all(options.out, options.seed)
    elif options.do == "ask":
        ask_all(options)
    else:
        draw_all(options.out)


def ask_all(options: argparse.Namespace) -> None:
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"commands": [], "machine": machine(), "cells": []}
    command = " ".join(["python", *sys.argv])
    if command not in results["commands"]:
        results["commands"].append(command)
    models = {name: BMojoLM.load(options.models / name).eval() for name in ("stored", "full")}
    for length in map(int, options.lengths.split(",")):
        for form in options.forms.split(","):
            for number in map(int, options.numbers.split(",")):
                task = Lookup(length=length, facts=facts_that_fit(length, form, options.facts), form=form)
                of = {"form": form, "length": length, "facts": task.facts, "number": number}
                done = {cell["method"] for cell in results["cells"] if of.items() <= cell.items()}
                for cell in measure(models, task, number, done):
                    results["cells"].append(of | cell)
                    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
                    told = {name: cell.get(name) for name in ("method", "exact", "digits", "read_us", "answer_us", "bytes")}
                    print(time.strftime("%H:%M:%S"), of, told, flush=True)


def facts_that_fit(length: int, form: str, most: int) -> int:
    sentence = len(FORMS[form]) + 24
    return min(most, length // (8 * sentence))


def measure(models: dict[str, BMojoLM], task: Lookup, number: int, done: set[str]) -> Iterator[dict[str, Any]]:
    """A cell of each way of remembering that is not done."""
    asked = task.haystack(number)
    text = torch.from_numpy(asked["haystack"])
    ways = [f"stored, stride {stride}" for stride in STRIDES]
    if {*ways, "without", "neighbours"} - done:
        with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "store", models["stored"]) as store:
            stored = Stored(models["stored"], store)
            microseconds = read(stored, text)
            for name, stride in zip(ways, STRIDES, strict=True):
                yield {"method": name, "read_us": microseconds, **ask(stored.with_settings(storage_stride=stride), asked)}
            without, neighbours = (object.__new__(kind) for kind in (Streamed, Neighbours))
            without.__dict__ |= stored.__dict__
            neighbours.__dict__ |= stored.__dict__
            yield {"method": "without", "read_us": microseconds, **ask(without, asked)}
            yield {"method": "neighbours", "read_us": microseconds, **ask(neighbours, asked)}
            yield {"method": "decoding", **decoding(stored, text)}
    for name, method in (("retrieved", Retrieved(models["full"])), ("retrieved, windowed", Retrieved(models["stored"]))):
        if name not in done:
            yield {"method": name, "read_us": read(method, text), **ask(method, asked)}
    if "full" not in done and task.length <= FULL_LENGTH:
        full = Streamed(models["full"])
        yield {"method": "full", "read_us": read(full, text), **ask(full, asked, batch_size=4)}


@torch.inference_mode()
def read(method: Method, text: torch.Tensor) -> float:
    """Microseconds a token."""
    clock = time.perf_counter()
    method.read(text)
    return (time.perf_counter() - clock) / len(text) * 1e6


@torch.inference_mode()
def decoding(stored: Stored, text: torch.Tensor, tokens: int = 128) -> dict[str, Any]:
    """Milliseconds of a token decoded with the store and without, in turns."""
    plain, state = stored.state, stored.state
    storage = Storage(stored.model.config, store=stored.store, write=False)
    storage.back(stored.mark)
    milliseconds: dict[str, list[float]] = {"with": [], "without": []}
    for token in text[:tokens, None, None]:
        clock = time.perf_counter()
        _, plain = stored.model(token, plain)
        milliseconds["without"].append((time.perf_counter() - clock) * 1e3)
        clock = time.perf_counter()
        _, state = stored.model(token, state, storage=storage)
        milliseconds["with"].append((time.perf_counter() - clock) * 1e3)
    stride = stored.model.config.storage_stride
    return {
        "stride": stride,
        "decode_ms": {name: statistics.median(values) for name, values in milliseconds.items()},
        "decode_mean_ms": {name: statistics.mean(values) for name, values in milliseconds.items()},
    }


if __name__ == "__main__":
    main()
