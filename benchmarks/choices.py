"""What each open choice does, all else equal, in a suite of `bmojo compare --profile quick`: one model a choice.

    python benchmarks/choices.py recall --out benchmarks/results/recall_choices.json [--seeds 0,1] [--only NAME,NAME]
    python benchmarks/choices.py text --out benchmarks/results/text_choices.json

Every model sees the same batches. Recall is by distance: inside the window, beyond it, and beyond the training length;
text is held-out bits per byte. Results are written after each model, and models that are there are not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from bmojo import BMojoLM, presets
from bmojo.compare.job import mqar_rows, score_recall, score_text
from bmojo.compare.profiles import PROFILES, RecallPlan, TextPlan
from bmojo.data import ByteTokenizer, PackedRows, prepare
from bmojo.files import write_whole
from bmojo.nn import init
from bmojo.train import train
from bmojo.train.machine import machine

RECALL: dict[str, dict[str, Any]] = {  # what chooses the slots is compared by `bmojo sweep`
    "default": {},
    "admission by innovation": {"admission": "innovation"},
    "no key convolution": {"conv_size": 0},
    "true positions": {"positions": "true"},
    "fading summary": {"fading": "summary"},
    "no fading memory": {"fading_span": 0},
    "untied sources": {"tie_sources": False},
    "window 32": {"window": 32},
    "forgetting 0.995": {"innovation_forgetting": 0.995},
    "forgetting 1": {"innovation_forgetting": 1.0},
    "half the slots": {"eidetic_slots": 24},
}
TEXT: dict[str, dict[str, Any]] = {  # `preset` and `residual_scale` are no settings of the model
    "default": {},
    "admission by innovation": {"admission": "innovation"},
    "residual branches at full scale": {"residual_scale": 1.0},
    "no key convolution": {"conv_size": 0},
    "fading summary": {"fading": "summary"},
    "untied sources": {"tie_sources": False},
    "no eidetic slots": {"eidetic_slots": 0},
    "transformer": {"preset": "transformer"},
    "transformer, residual branches at full scale": {"preset": "transformer", "residual_scale": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["recall", "text"])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, or to go on with")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="names of choices, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    choices, measure = (RECALL, measure_recall) if options.suite == "recall" else (TEXT, measure_text)
    chosen = options.only.split(",") if options.only else list(choices)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"models": []}
    report["machine"] = machine()
    done = {(model["choice"], model["seed"]) for model in report["models"]}
    for seed in map(int, options.seeds.split(",")):
        for name in chosen:
            if (name, seed) not in done:
                scores = measure(choices[name], seed)
                report["models"].append({"choice": name, "seed": seed, "changes": choices[name], **scores})
                write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
                print(name, seed, {key: value for key, value in scores.items() if key != "recall"}, flush=True)


def measure_recall(changes: dict[str, Any], seed: int) -> dict[str, Any]:
    plan = PROFILES["quick"].recall
    plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=seed))
    vocabulary = plan.task(plan.pairs).vocab_size
    fields = {**plan.changes, "vocab_size": vocabulary, "eidetic_slots": plan.eidetic_slots, **changes}
    model, scores = trained("bmojo", plan, fields, mqar_rows(plan))
    return {**scores, "recall": score_recall(model, plan)}


def measure_text(changes: dict[str, Any], seed: int) -> dict[str, Any]:
    plan = PROFILES["quick"].text
    plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=seed))
    fields = {"vocab_size": 256, **changes}
    preset, scale = fields.pop("preset", "bmojo"), fields.pop("residual_scale", init.RESIDUAL_SCALE)
    default, init.RESIDUAL_SCALE = init.RESIDUAL_SCALE, scale
    with tempfile.TemporaryDirectory() as folder:
        data = prepare("stdlib", ByteTokenizer(), Path(folder) / "data", seed=seed)
        rows = PackedRows(data.train, plan.train.seq_len, seed)
        model, scores = trained(preset, plan, fields, rows.__getitem__)
        init.RESIDUAL_SCALE = default
        return {**scores, **score_text(model, plan, data)}


def trained(preset: str, plan: RecallPlan | TextPlan, fields: dict[str, Any], rows: Any) -> tuple[BMojoLM, dict]:
    """The model after its training, and what that cost."""
    torch.manual_seed(plan.train.seed)
    model = BMojoLM(presets.matched(preset, plan.size, **fields))
    with tempfile.TemporaryDirectory() as folder:
        record = train(model, rows, plan.train, Path(folder), tensorboard=False)
    state = model.eval().empty_state().nbytes
    return model, {"tokens_per_second": record.tokens_per_second, "state_bytes": state, "loss": record.loss[-1][1]}


if __name__ == "__main__":
    main()
