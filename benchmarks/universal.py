"""The family of `bmojo compare` at 100k parameters each against the best predictors there are.

    python benchmarks/universal.py --out docs/results/universal --work runs/universal
        [--sources markov_tree ...] [--models bmojo ...] [--seeds 0 1 2] [--steps 512] [--learning-rate 4e-3]

Trains each model on fresh sequences of each source, scores it at powers of two of steps, and writes the report of all
that is finished under `--work`. What is finished is not done again, and what was stopped goes on.

Sources and references: "universal", outputs of random programs of a small universal machine, against the table
M_{D,T} of the same machine, depth and steps, which is the exact optimum; "markov_tree", bits of random context trees,
against CTW of the same depth, which is the Bayes predictor; "linear_gaussian", quantised outputs of random stable
systems, against the Kalman filter that knows the system. Every figure is in bits.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmojo import presets
from bmojo.config import ModelConfig
from bmojo.data.synthetic import EVALUATION, Task, make_task, task_record
from bmojo.data.synthetic.linear_gaussian import LinearGaussian
from bmojo.data.synthetic.markov_tree import MarkovTree
from bmojo.files import write_whole
from bmojo.nn.count import parameters
from bmojo.nn.model import BMojoLM
from bmojo.train import TrainSettings, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows
from bmojo.universal.gap import Gap, InContext, ctw_gap, kalman_gap

SEQUENCES = (128, 512)  # each of a source of its own, to score a model on: while it is trained, and at the end


@dataclass(frozen=True)
class Source:
    """A task, the tokens of a step, and the window (also chunk, fading span and number of slots) of its models."""

    task: Task
    batch_size: int
    window: int

    def config(self, model: str) -> ModelConfig:
        changes: dict[str, Any] = {"window": self.window, "chunk_size": self.window}
        if model not in ("mamba2", "gdn"):
            changes["conv_size"] = 4  # all keys come from short convolutions, not only those of `bmojo`
        if model == "bmojo":
            changes["eidetic_slots"] = self.window
        return presets.matched(
            model, "tiny", vocab_size=self.task.vocab_size, hidden_size=64, num_layers=2, intermediate_size=169,
            ssm_head_dim=16, ssm_state_size=16, **changes,
        )  # fmt: skip

    def gaps(self, model: BMojoLM, sequences: int) -> dict[str, Gap]:
        """The gap to each reference of this source."""
        if isinstance(self.task, MarkovTree):
            return ctw_gap(InContext(model), self.task, EVALUATION, sequences)._asdict()
        assert isinstance(self.task, LinearGaussian)
        bins = self.task.bins
        return {"kalman": kalman_gap(InContext(model, range(bins), bins), self.task, EVALUATION, sequences)}


SOURCES = {
    "markov_tree": Source(make_task("markov_tree", length=256, depth=10), batch_size=16, window=32),
    "linear_gaussian": Source(make_task("linear_gaussian", length=128), batch_size=32, window=16),
}


def score(gaps: dict[str, Gap], whole: bool) -> dict[str, Any]:
    """What is kept of gaps: totals, and if `whole` those of each position and of each source."""
    kept = {}
    for name, gap in gaps.items():
        kept[name] = {"total": gap.total, "ci95": gap.total_ci95, "entropy": gap.entropy}
        if whole:
            kept[name] |= {key: np.round(getattr(gap, key), 5).tolist() for key in ("positions", "totals")}
    return kept


def run(source: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and score one model: WORK/SOURCE/NAME-SEED/scores.json."""
    spec, folder = SOURCES[source], options.work / source / f"{name}-{seed}"
    if (folder / "scores.json").exists():
        return
    config = spec.config(name)
    settings = TrainSettings(
        steps=options.steps, batch_size=spec.batch_size, seq_len=spec.task.length, seed=seed,
        learning_rate=options.learning_rate, checkpoint_every=128,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BMojoLM(config)

    def on_step(step: int, loss: float) -> None:
        """Score at powers of two and at the end; a step that was scored before a stop is not scored again."""
        at = folder / "scores" / f"{step}.json"
        last = step == settings.steps
        if ((step & (step - 1) == 0 and step >= 32) or last) and not at.exists():
            scores = score(spec.gaps(model, SEQUENCES[last]), whole=last)
            write_whole(at, json.dumps({"step": step, "sequences": step * spec.batch_size, **scores}).encode())
            print(
                source, name, seed, step, {key: round(value["total"], 3) for key, value in scores.items()}, flush=True
            )

    # every seed has data of its own
    task = make_task(**{**task_record(spec.task), "seed": seed + 1})
    record = train(model, task_rows([task], spec.batch_size), settings, folder, on_step=on_step, tensorboard=False)
    scores = sorted(
        (json.loads(path.read_text()) for path in (folder / "scores").glob("*.json")), key=lambda s: s["step"]
    )
    report = {
        "source": source, "model": name, "seed": seed, "parameters": parameters(config), "config": config.to_dict(),
        "settings": settings.to_dict(), "seconds": record.seconds, "machine": machine(), "scores": scores,
    }  # fmt: skip
    write_whole(folder / "scores.json", (json.dumps(report) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/universal"))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--models", nargs="+", choices=presets.COMPARED, default=list(presets.COMPARED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for source in options.sources:
            for name in options.models:
                run(source, name, seed, options)


if __name__ == "__main__":
    main()
