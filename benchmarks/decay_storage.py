"""Decay in the model's own loop: the drifting source read by a model with storage.

    python benchmarks/decay_storage.py --out docs/results/decay_storage [--seeds 3] [--processes 3]

The models and the source are those of decay_retrieval.py, in three stretches of 6,144 tokens: the world stands still,
drifts, stands still again; between them all keys change, and half of what is shown is wrong. But here nothing is told
to the decay: the layer reads 16 blocks of 64 tokens for every 4 tokens, in one softmax with its window of 64 tokens,
and learns from the tokens that come. What is measured is the model's own prediction at every question.

The model was not trained with storage, and what is read is asked for by the tokens before the stride, not by the
question: figures compare rules, and are no measure of what storage can do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import decay_retrieval as source
import numpy as np
import torch
import torch.nn.functional as F

from bmojo import BMojoLM
from bmojo.config import ModelConfig
from bmojo.data.synthetic import NO_ANSWER
from bmojo.figures import make_picture, new_figure, write_pictures
from bmojo.files import write_whole
from bmojo.memory.decay import Decay, DecayPolicy
from bmojo.memory.storage import Storage
from bmojo.sweep.report import T95
from bmojo.tables import Cell, Column, Table, markdown
from bmojo.train.machine import machine

STRETCH = 6144
STORAGE: dict[str, Any] = {"window": 64, "chunk_size": 64, "storage_layers": (0,), "storage_block": 64,
                           "storage_keys": 64, "storage_stride": 4, "storage_queries": 4,
                           "storage_blocks": 16}  # fmt: skip
RULES: dict[str, Decay | bool | None] = {
    "the window alone": None,
    "no decay": False,
    "half-life 30": Decay(DecayPolicy(half_lives=(30,), clusters=0, share=0)),
    "learned": True,
}
COLOURS = {"no decay": "#000000", "half-life 30": "#009E73", "learned": "#D55E00"}


@torch.no_grad()
def read(weights: dict[str, torch.Tensor], tokens: np.ndarray, decay: Decay | bool | None) -> dict[str, Any]:
    """Log-probabilities of every next token [T, vocabulary], the half-life after every segment, seconds."""
    model = BMojoLM(ModelConfig(vocab_size=len(weights["embed.weight"]), **{**source.MODEL, **STORAGE})).eval()
    model.load_state_dict(weights)
    storage = None if decay is None else Storage(model.config, decay=decay)
    state, found, half_life, start = None, [], [], time.perf_counter()
    for part in torch.from_numpy(tokens)[None].split(512, 1):
        logits, state = model(part, state, storage=storage)
        found.append(F.log_softmax(logits[0].float(), -1).numpy())
        half_life += [] if storage is None else storage.half_life
    return {"log_p": np.concatenate(found), "half_life": half_life, "seconds": time.perf_counter() - start}


def measure(seed: int) -> dict[str, Any]:
    """By rule: bits and right [questions], the half-life, seconds."""
    torch.set_num_threads(1)
    source.STRETCH = STRETCH
    weights, data = source.trained(seed), source.stream(seed)
    asked = np.flatnonzero(data["labels"] != NO_ANSWER)
    asked = asked[asked >= source.WINDOW + source.BLOCK]
    answer, old = data["labels"][asked], data["stale"][asked]
    rules = {}
    for name, decay in RULES.items():
        run = read(weights, data["tokens"], decay)
        guess = run["log_p"][asked].argmax(-1)
        bits = -run["log_p"][asked, answer] / np.log(2)
        each = {"bits": bits, "right": (guess == answer) * 1.0, "stale": (guess == old) * 1.0}
        rules[name] = each | {"half_life": run["half_life"], "seconds": run["seconds"]}
        print(seed, f"{name:18}", *(f"{what} {each[what][asked // STRETCH == n].mean():.3f}"
              for n in range(3) for what in each), f"{run['seconds']:.0f} s", flush=True)  # fmt: skip
    return {"asked": asked, "rules": rules}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        runs = pool.map(measure, range(options.seeds), chunksize=1)
    cells, columns = [], []
    for n, stretch in enumerate(source.STRETCHES):
        for what, best in (("bits", min), ("right", max), ("stale", min)):
            column: dict[str, Cell] = {}
            for rule in RULES:
                each = np.array([run["rules"][rule][what][run["asked"] // STRETCH == n].mean() for run in runs])
                wide = float(T95[len(each) - 2] * each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else 0.0
                mean = float(each.mean())
                cells.append({"stretch": stretch, "measure": what, "rule": rule, "mean": mean, "ci95": wide,
                              "seeds": each.tolist()})  # fmt: skip
                column[rule] = Cell(mean, f"{mean:.3f} ± {wide:.3f}", mean - wide, mean + wide)
            if not (what == "stale" and n != 1):
                columns.append(Column(f"{stretch}, {what}", (stretch, what), column, best))
    report = {
        "command": f"python benchmarks/decay_storage.py --out {options.out} --seeds {options.seeds} "
        f"--processes {options.processes}",
        "machine": machine(), "model": source.MODEL, "storage": STORAGE, "task": source.TASK,
        "training": source.TRAINING, "stretch": STRETCH, "noise": source.NOISE, "cells": cells,
        "questions": [len(run["asked"]) for run in runs],
        "seconds": {rule: [round(run["rules"][rule]["seconds"], 1) for run in runs] for rule in RULES},
        "half_life": [[None if np.isinf(h) else round(h, 1) for h in run["rules"]["learned"]["half_life"]]
                      for run in runs],
    }  # fmt: skip
    table = markdown(Table(list(RULES), columns)).replace("| model |", "| rule |")
    write_whole(options.out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(options.out / "table.md", f"# Decay in the model's own loop\n\n{table}\n".encode())
    write_pictures(options.out / "figures", [picture(runs)])
    print(table)


def picture(runs: list[dict[str, Any]], width: int = 128) -> Any:
    figure, (bits, life) = new_figure(2)
    least = min(len(run["asked"]) for run in runs) // width * width
    place = np.mean([run["asked"][:least].reshape(-1, width).mean(1) for run in runs], 0) / source.BLOCK
    for rule, colour in COLOURS.items():
        curve = np.mean([run["rules"][rule]["bits"][:least].reshape(-1, width).mean(1) for run in runs], 0)
        bits.plot(place, curve, color=colour, label=rule, linewidth=1.4)
    bits.set_ylabel("bits a question")
    for run in runs:
        learned = np.minimum(run["rules"]["learned"]["half_life"], 1e4)
        life.plot(np.arange(1, len(learned) + 1) * 512 / source.BLOCK, learned, color="#D55E00", linewidth=0.8)
    life.set_yscale("log")
    life.set_ylabel("half-life in blocks (inf: 10,000)")
    for axis in (bits, life):
        axis.set_xlabel("blocks read")
        for n in (1, 2):
            axis.axvline(n * STRETCH / source.BLOCK, color="#555555", linestyle="--", linewidth=1)
    return make_picture(figure, [bits, life], "storage", "Bits a question, and the learned half-life.")


if __name__ == "__main__":
    main()
