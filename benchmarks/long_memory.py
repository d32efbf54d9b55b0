"""Look-ups in real text far beyond any window: a store inside the layer, against none, plain retrieval, full attention.

    python benchmarks/long_memory.py train --out runs/long
    python benchmarks/long_memory.py ask --models runs/long --out docs/results/storage --lengths 65536,1048576
    python benchmarks/long_memory.py draw --out docs/results/storage

`train`: PHASES, each of which starts from the weights of another and goes on where it was stopped. `base` learns
look-ups with full attention, in three layers of four heads. Its first layer that attends finds everything, with the
heads of one key: the layer and the heads behind that are left out from then on (a block is found by the sum over all
heads, so heads that look elsewhere hide it). From it come `full` (full attention) and `stored` (window, eidetic slots,
and a store, trained with the blocks of the other rows as distractors).

`ask`: of one haystack a form, length and number, read once: every question, by each way of remembering. Results are
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
from bmojo.figures import make_picture, new_figure, token_axis, write_pictures
from bmojo.files import write_whole
from bmojo.memory.storage import Storage
from bmojo.memory.store import Store
from bmojo.train import TrainSettings, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows

STRIDES = (4, 16, 64)
FULL_LENGTH = 16384
LINES = {
    "stored, stride 4": ("#D55E00", "D"), "stored, stride 16": ("#E69F00", "v"), "stored, stride 64": ("#F0E442", "<"),
    "without": ("#56B4E9", "s"), "neighbours": ("#CC79A7", "P"), "retrieved": ("#009E73", "^"),
    "full": ("#000000", "o"),
}  # fmt: skip
LAYERS: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "intermediate_size": 128,
    "conv_size": 4, "rope_theta": 1000.0, "ssm_head_dim": 16, "ssm_conv": 12, "num_layers": 2,
    "pattern": ["ssm", "attention"],
}  # fmt: skip
WIDE = {"num_layers": 3, "pattern": ["ssm", "attention", "attention"], "num_heads": 4, "num_kv_heads": 2}
FOUR = {"num_heads": 4, "num_kv_heads": 2}
STORED = {
    "pattern": ["ssm", "bmojo"], "window": 64, "eidetic_slots": 32, "innovation": "recent", "storage_layers": [-1],
    "storage_stride": 4, "storage_keys": 16, "storage_blocks": 4,
}  # fmt: skip
# name: the phase it starts from, changes of LAYERS; of a step the rows, their length and facts; steps, learning rate
PHASES: dict[str, tuple[str | None, dict[str, Any], int, int, int, int, float]] = {
    "base": (None, WIDE, 16, 256, 4, 1500, 4e-3),
    "longer": ("base", FOUR, 8, 512, 8, 300, 2e-3),
    "full": ("longer", {}, 8, 512, 8, 200, 2e-3),
    "begun": ("longer", {**STORED, "storage_keys": 8, "storage_blocks": 2}, 8, 256, 4, 200, 1.5e-3),
    "more": ("begun", {**STORED, "storage_keys": 8, "storage_blocks": 3}, 24, 256, 4, 300, 2e-3),
    "stored": ("more", STORED, 24, 276, 4, 690, 2e-3),
}


def train_all(out: Path, seed: int) -> None:
    for name, (start, changes, rows, length, facts, steps, rate) in PHASES.items():
        torch.manual_seed(seed)
        model = BMojoLM(presets.transformer("tiny", **{**LAYERS, **changes}))
        if start is not None:
            model.load_state_dict(cut(BMojoLM.load(out / start / "model"), model), strict=False)
        settings = TrainSettings(steps=steps, batch_size=rows, seq_len=length, learning_rate=rate, warmup_steps=40,
                                 min_learning_rate_ratio=0.2, seed=seed)  # fmt: skip
        task = Lookup(length=length, facts=facts, early=True, seed=seed)
        record = train(model, task_rows([task], rows), settings, out / name, tensorboard=False)
        print(name, record.loss[-1], f"{record.seconds:.0f} s", flush=True)


def cut(old: BMojoLM, model: BMojoLM) -> dict[str, torch.Tensor]:
    """The weights of `old` that `model` has, of its first heads alone if it has fewer."""
    mine = model.state_dict()
    return {
        name: tensor[tuple(slice(size) for size in mine[name].shape)]
        for name, tensor in old.state_dict().items()
        if name in mine
    }


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
    results = {"commands": [], "machine": machine(), "seed": options.seed, "cells": []}
    if path.exists():
        results = json.loads(path.read_text())
    command = " ".join(["python", *sys.argv])
    if command not in results["commands"]:
        results["commands"].append(command)
    models = {name: BMojoLM.load(options.models / name / "model").eval() for name in ("stored", "full")}
    for length in map(int, options.lengths.split(",")):
        for form in options.forms.split(","):
            for number in map(int, options.numbers.split(",")):
                task = Lookup(length=length, facts=facts_that_fit(length, form, options.facts), form=form)
                of = {"form": form, "length": length, "facts": task.facts, "number": number}
                done = {cell["method"] for cell in results["cells"] if of.items() <= cell.items()}
                for cell in measure(models, task, number, done):
                    results["cells"].append(of | cell)
                    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
                    told = {
                        name: cell.get(name) for name in ("method", "exact", "digits", "read_us", "answer_us", "bytes")
                    }
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
            microseconds = {"read_us": read(stored, text)}
            for name, stride in zip(ways, STRIDES, strict=True):
                yield {"method": name, **microseconds, **ask(stored.with_settings(storage_stride=stride), asked)}
            without, neighbours = (object.__new__(kind) for kind in (Streamed, Neighbours))
            without.__dict__ |= stored.__dict__
            neighbours.__dict__ |= stored.__dict__
            yield {"method": "without", **microseconds, **ask(without, asked)}
            yield {"method": "neighbours", **microseconds, **ask(neighbours, asked)}
            if "decoding" not in done:
                timed = [decoding(stored.with_settings(storage_stride=stride), text) for stride in STRIDES]
                yield {"method": "decoding", "strides": timed}
    if "retrieved" not in done:
        retrieved = Retrieved(
            models["full"], count=2, size=192, step=128
        )  # with the question, as long as it was trained
        yield {"method": "retrieved", "read_us": read(retrieved, text), **ask(retrieved, asked)}
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
    return {
        "stride": stored.model.config.storage_stride,
        "decode_ms": {name: statistics.median(values) for name, values in milliseconds.items()},
        "decode_mean_ms": {name: statistics.mean(values) for name, values in milliseconds.items()},
    }


def draw_all(folder: Path) -> None:
    """Numbers exactly right by the length of the text, one panel a form."""
    cells = json.loads((folder / "results.json").read_text())["cells"]
    forms = list(dict.fromkeys(cell["form"] for cell in cells))
    figure, axes = new_figure(len(forms), share_y=True, columns=3)
    for axis, form in zip(axes, forms, strict=True):
        for method, (colour, marker) in LINES.items():
            of = [cell for cell in cells if cell["form"] == form and cell["method"] == method]
            points = sorted({cell["length"] for cell in of})
            shares = [statistics.mean(cell["exact"] for cell in of if cell["length"] == length) for length in points]
            if points:
                axis.plot(points, shares, color=colour, marker=marker, label=method, linewidth=1.6, markersize=5)
        token_axis(axis, "bytes of text")
        axis.set(title=form, ylabel="numbers exactly right", ylim=(-0.03, 1.03))
    picture = make_picture(figure, axes, "by_length", "Numbers exactly right by the length of the text")
    write_pictures(folder / "figures", [picture])


if __name__ == "__main__":
    main()
