"""Decay on what a model itself retrieves, from a source that drifts.

    python benchmarks/decay_retrieval.py --out docs/results/decay_retrieval [--seeds 3]

A model of one attention layer (one head, keys from a short convolution) is trained on the drifting source, 64 keys,
256 tokens. Then it reads three stretches of 16,384 tokens, of which the middle one drifts (each showing changes its key
with probability 0.2) and the others stand still; between them all keys change, and half of what is shown is wrong, so
that one showing is not enough. Its window is 64 tokens, in which a key is seldom there again, and its keys go to a
store in blocks of 64 tokens. At every fourth question the query of the layer finds blocks, 16 of each band of age; the
logits of the attention to their tokens, at the distance of a found block, are votes for these tokens (the value at a
place is the token's own), mixed with a tenth of the model's own prediction.

The 16 blocks attended to, and what their tokens' logits get, by rule: most similar; one half-life; learned, as
`bmojo.memory.decay` does; the same, for the choice of blocks, their logits as they are; the same, with the log-mixture
just added; the same, learned from what was attended to alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bmojo import BMojoLM
from bmojo.config import ModelConfig
from bmojo.data.synthetic import EVALUATION, NO_ANSWER, make_task
from bmojo.figures import make_picture, new_figure, write_pictures
from bmojo.files import write_whole
from bmojo.memory.decay import Decay, DecayPolicy, rate_losses
from bmojo.memory.engines import Block, Engine, Found
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.ops.rope import rope_table, rotate
from bmojo.sweep.report import T95
from bmojo.tables import Cell, Column, Table, markdown
from bmojo.train import TrainSettings, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows

MODEL: dict[str, Any] = {"hidden_size": 64, "num_layers": 1, "num_heads": 1, "intermediate_size": 0, "conv_size": 4,
                         "window": None, "pattern": ("attention",)}  # fmt: skip
TASK: dict[str, Any] = {"name": "drift", "length": 256, "keys": 64, "values": 64, "hazard": 0.2}
TRAINING: dict[str, Any] = {"steps": 250, "batch_size": 32, "learning_rate": 1e-2}
BLOCK, WINDOW, COUNT, STRETCH, EVERY, BASE, NOISE = 64, 64, 16, 16_384, 4, 0.1, 0.5
STRETCHES = {"stands still": 0.0, "drifts": 0.2, "stands still again": 0.0}
LIVES = DecayPolicy().half_lives
RULES = ["none", "half-life 1,000", "half-life 300", "half-life 100", "half-life 30", "learned",
         "learned, for the choice alone", "learned, added to logits", "learned from what was attended to"]  # fmt: skip


def trained(seed: int) -> dict[str, torch.Tensor]:
    task = make_task(**TASK, seed=seed)
    torch.manual_seed(seed)
    model = BMojoLM(ModelConfig(vocab_size=task.vocab_size, **MODEL))
    settings = TrainSettings(**TRAINING, seq_len=task.length, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        train(model, task_rows([task], settings.batch_size), settings, Path(folder), tensorboard=False)
    return model.state_dict()


def stream(seed: int) -> dict[str, np.ndarray]:
    """tokens, labels, stale [3 * STRETCH]; the wrong values of NOISE of the showings are random."""
    parts = [
        make_task(**{**TASK, "length": STRETCH, "hazard": hazard}, seed=seed).batch(EVALUATION + n, 1)
        for n, hazard in enumerate(STRETCHES.values())
    ]
    data = {name: np.concatenate([part[name][0] for part in parts]) for name in ("tokens", "labels", "stale")}
    random = np.random.default_rng(seed)
    wrong = np.flatnonzero(data["labels"][::2] == NO_ANSWER) * 2 + 1
    wrong = wrong[random.random(len(wrong)) < NOISE]
    data["tokens"][wrong] = TASK["keys"] + random.integers(TASK["values"], size=len(wrong))
    return data


@torch.no_grad()
def read(weights: dict[str, torch.Tensor], tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys of the layer [T, P], as a query meets the tokens of a found block, and log-probabilities of
    every next token, of the model with its window alone [T, vocabulary]."""
    config = {**MODEL, "window": WINDOW, "chunk_size": WINDOW}
    model = BMojoLM(ModelConfig(vocab_size=len(weights["embed.weight"]), **config)).eval()
    model.load_state_dict(weights)
    seen: dict[str, torch.Tensor] = {}
    mixer = model.blocks[0].mixer
    for name in ("q_proj", "k_proj"):
        getattr(mixer, name).register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, out[0, :, None])
        )
    logits = model(torch.from_numpy(tokens)[None])[0][0]
    place, size = torch.arange(len(tokens)) % BLOCK, mixer.config.head_dim

    def turned(x: torch.Tensor, position: torch.Tensor) -> np.ndarray:
        return rotate(x[None], rope_table(position[None], size, mixer.config.rope_theta, x.dtype))[0, :, 0].numpy()

    q = turned(seen["q_proj"], torch.full_like(place, WINDOW + BLOCK)) * size**-0.5
    return q, turned(seen["k_proj"], place), F.log_softmax(logits.float(), -1).numpy()


def candidates(engine: Engine, queries: np.ndarray, generation: int) -> Found:
    """Among these, the blocks that `reranked` gives for any weights: the COUNT most similar of each band of age."""
    bands = [
        engine.search(0, queries, COUNT, generation=newest, after=after)
        for after, newest in DecayPolicy().bands(generation)
    ]
    return Found(*(np.concatenate(part, 1) for part in zip(*bands, strict=True)))


def measure(seed: int) -> dict[str, Any]:
    """By rule: bits, right, stale [questions]; and the half-life of the learned one at each."""
    data = stream(seed)
    q, k, own = read(trained(seed), data["tokens"])
    asked = np.flatnonzero(data["labels"] != NO_ANSWER)
    asked = asked[asked >= WINDOW + BLOCK][::EVERY]
    engine, none = MemoryEngine(), np.zeros((BLOCK, 1, 1), np.float16)
    score = np.zeros(BLOCK, np.float32)
    engine.put([
        Block(0, "s", at, data["tokens"][at : at + BLOCK], none, none, k[at : at + BLOCK], score)
        for at in range(0, len(k), BLOCK)
    ])  # fmt: skip
    fixed = {rule: Decay(DecayPolicy(half_lives=(h,), clusters=0, share=0)) for rule, h in
             (("none", np.inf), *((f"half-life {h:,.0f}", h) for h in LIVES[2:]))}  # fmt: skip
    now = {rule: Decay() for rule in RULES if rule.startswith("learned")}
    spent: dict[str, dict[str, list[float]]] = {rule: {"bits": [], "right": [], "stale": []} for rule in RULES}
    half_life: list[float] = []
    found_for: dict[int, Found] = {}
    for generation in np.unique(asked // BLOCK - 1):
        at = asked[asked // BLOCK - 1 == generation]
        for i, *row in zip(at, *candidates(engine, q[at], int(generation)), strict=True):
            found_for[i] = Found(*row)
    for i in asked:
        generation = int(i) // BLOCK - 1
        query, target, old = q[i : i + 1], data["labels"][i], data["stale"][i]
        there = found_for[i].id >= 0
        ids, similarity = found_for[i].id[there], found_for[i].score[there]
        at = (ids[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        logits, tokens, ages = k[at] @ query[0], data["tokens"][at], np.repeat(generation - ids, BLOCK)
        cluster = now["learned"].policy.cluster(query)
        for rule in RULES:
            decay = fixed.get(rule) or now[rule]
            mine = None if rule in fixed else cluster
            ranked = decay.scores(similarity[None], (generation - ids)[None], mine)[0]
            if rule == "learned, added to logits":
                ranked = similarity + decay.log_mixture((generation - ids)[None], mine)[0]
            best = np.repeat(np.isin(np.arange(len(ids)), np.argsort(-ranked, kind="stable")[:COUNT]), BLOCK)
            found = logits[None, best], ages[None, best]
            if rule == "learned, for the choice alone":
                weight = found[0][0]
            elif rule == "learned, added to logits":
                weight = (found[0] + decay.log_mixture(found[1], mine))[0]
            else:
                weight = decay.scores(*found, mine)[0]
            votes = np.bincount(tokens[best], np.exp(weight - weight.max()), own.shape[1])
            p = (1 - BASE) * votes / votes.sum() + BASE * np.exp(own[i])
            result = spent[rule]
            result["bits"].append(-np.log2(p[target]))
            result["right"].append(p.argmax() == target)
            result["stale"].append(p.argmax() == old)
            if rule in now:
                of = best if rule == "learned from what was attended to" else np.ones_like(best)
                losses = rate_losses(
                    logits[None, of], ages[None, of], tokens[None, of], target[None], own[i, target][None], LIVES
                )
                now[rule] = decay.update(losses, cluster)[0]
        half_life.append(now["learned"].half_life)
    stretch = asked // STRETCH
    answer, guess = data["labels"][asked], own[asked].argmax(-1)
    alone = {"bits": -own[asked, answer] / np.log(2), "right": guess == answer, "stale": guess == data["stale"][asked]}
    every = {"the window alone": alone} | spent
    return {
        "rules": {rule: {what: np.array(x, float) for what, x in each.items()} for rule, each in every.items()},
        "stretch": stretch, "asked": asked, "half_life": np.array(half_life),
        "clusters": np.bincount(now["learned"].policy.cluster(q[asked]), minlength=64),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(seed))
        for rule, each in runs[-1]["rules"].items():
            print(seed, f"{rule:36}", *(
                f"{name} {each[name][runs[-1]['stretch'] == n].mean():.3f}" for n in range(3) for name in each
            ), flush=True)  # fmt: skip
    cells, columns = [], []
    for n, stretch in enumerate(STRETCHES):
        for what, best in (("bits", min), ("right", max), ("stale", min)):
            column: dict[str, Cell] = {}
            for rule in runs[0]["rules"]:
                each = np.array([run["rules"][rule][what][run["stretch"] == n].mean() for run in runs])
                wide = float(T95[len(each) - 2] * each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else 0.0
                mean = float(each.mean())
                cells.append({"stretch": stretch, "measure": what, "rule": rule, "mean": mean, "ci95": wide,
                              "seeds": each.tolist()})  # fmt: skip
                column[rule] = Cell(mean, f"{mean:.3f} ± {wide:.3f}", mean - wide, mean + wide)
            if not (what == "stale" and n != 1):
                columns.append(Column(f"{stretch}, {what}", (stretch, what), column, best))
    report = {
        "command": f"python benchmarks/decay_retrieval.py --out {options.out} --seeds {options.seeds}",
        "machine": machine(), "model": MODEL, "task": TASK, "training": TRAINING, "count": COUNT, "block": BLOCK,
        "window": WINDOW, "stretch": STRETCH, "every": EVERY, "noise": NOISE, "cells": cells,
        "questions": len(runs[0]["asked"]), "clusters": [run["clusters"].tolist() for run in runs],
        "half_life": [[[int(a), None if np.isinf(h) else round(float(h), 1)] for a, h in
                       zip(run["asked"][::10], run["half_life"][::10], strict=True)] for run in runs],
    }  # fmt: skip
    table = markdown(Table(list(runs[0]["rules"]), columns)).replace("| model |", "| rule |")
    write_whole(options.out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(options.out / "table.md", f"# Decay on what a model retrieves\n\n{table}\n".encode())
    write_pictures(options.out / "figures", [picture(runs)])
    print(table)


def picture(runs: list[dict[str, Any]], width: int = 128) -> Any:
    figure, (right, life) = new_figure(2)
    colours = {"none": "#000000", "half-life 1,000": "#56B4E9", "half-life 100": "#E69F00", "half-life 30": "#009E73",
               "learned, added to logits": "#CC79A7", "learned": "#D55E00"}  # fmt: skip
    least = min(len(run["asked"]) for run in runs) // width * width
    blocks = np.mean([run["asked"][:least].reshape(-1, width).mean(1) for run in runs], 0) / BLOCK
    for rule, colour in colours.items():
        curve = np.mean([run["rules"][rule]["bits"][:least].reshape(-1, width).mean(1) for run in runs], 0)
        right.plot(blocks, curve, color=colour, label=rule, linewidth=1.4)
    right.set_ylabel("bits a question")
    for run in runs:
        life.plot(run["asked"] / BLOCK, np.minimum(run["half_life"], 1e4), color="#D55E00", linewidth=0.8)
    life.set_yscale("log")
    life.set_ylabel("half-life in chunks (inf: 10,000)")
    for axis in (right, life):
        axis.set_xlabel("chunks read")
        for n in (1, 2):
            axis.axvline(n * STRETCH / BLOCK, color="#555555", linestyle="--", linewidth=1)
    return make_picture(figure, [right, life], "retrieval", "Bits a question, and the learned half-life.")


if __name__ == "__main__":
    main()
