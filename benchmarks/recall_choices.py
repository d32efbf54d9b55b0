"""What each open choice of the bmojo layer does to recall: one model a choice, all else equal, in the recall suite of
`bmojo compare --profile quick`.

    python benchmarks/recall_choices.py --out benchmarks/results/recall_choices.json [--seeds 0,1] [--only NAME,NAME]

Every model sees the same batches. Accuracies are by distance, as in the suite: inside the window, beyond it, and beyond
the training length. Results are written after each model, and models that are there already are not trained again.
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
from bmojo.compare.job import cpu_name, mqar_rows, score_recall
from bmojo.compare.profiles import PROFILES
from bmojo.files import write_whole
from bmojo.train import train

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "no key convolution": {"conv_size": 0},
    "true positions": {"positions": "true"},
    "forgetting 0.995": {"innovation_forgetting": 0.995},
    "forgetting 1": {"innovation_forgetting": 1.0},
    "as first designed": {"positions": "true", "innovation_forgetting": 0.995},
    "fading summary": {"fading": "summary"},
    "innovation ema": {"innovation": "ema"},
    "innovation state": {"innovation": "state"},
    "innovation head": {"innovation": "head"},
    "innovation random": {"innovation": "random"},
    "innovation recent": {"innovation": "recent"},
    "innovation first": {"innovation": "first"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, or to go on with")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="names of choices, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = options.only.split(",") if options.only else list(CHOICES)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"models": []}
    report["machine"] = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    done = {(model["choice"], model["seed"]) for model in report["models"]}
    for seed in map(int, options.seeds.split(",")):
        for name in chosen:
            if (name, seed) not in done:
                report["models"].append({"choice": name, "seed": seed, **measure(CHOICES[name], seed)})
                write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
                print(line(report["models"][-1]), flush=True)


def measure(changes: dict[str, Any], seed: int) -> dict[str, Any]:
    plan = PROFILES["quick"].recall
    plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=seed))
    vocabulary = plan.task(plan.pairs).vocab_size
    fields = {**plan.changes, "vocab_size": vocabulary, "eidetic_slots": plan.eidetic_slots, **changes}
    torch.manual_seed(seed)
    model = BMojoLM(presets.matched("bmojo", plan.size, **fields))
    with tempfile.TemporaryDirectory() as folder:
        record = train(model, mqar_rows(plan), plan.train, Path(folder), tensorboard=False)
    state = model.eval().empty_state().nbytes
    return {
        "changes": changes,
        "tokens_per_second": record.tokens_per_second,
        "state_bytes": state,
        "final_loss": record.loss[-1][1],
        "recall": score_recall(model, plan),
    }


def line(model: dict[str, Any]) -> str:
    scores = "  ".join(f"{row['distance']}: {row['accuracy']:.3f}" for row in model["recall"])
    return f"{model['choice']:<20} seed {model['seed']}  {scores}  {model['tokens_per_second']:,.0f} tokens/s"


if __name__ == "__main__":
    main()
