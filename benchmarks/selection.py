"""Ways of choosing what the eidetic slots keep that are no settings of the model, at equal slots.

    python benchmarks/selection.py --out benchmarks/results/selection.json [--sources text,noise,drift] [--seeds 0,1,2]

Each trains `bmojo` with the innovation's score replaced: on MQAR with its pairs spread among filler (real text, or
uniform noise), admission being that score alone; or on the drifting source, where learned admission multiplies it.

oracle    1 for the tokens of the pairs, 0 for the others: what no test can know, the upper bound
values    1 for the values alone: with the key convolution they carry their keys
spans     max(s_t, s_{t-1}): a token is kept along with the innovative one before it
diverse   s_t * (1 - max_j cos^2(c_t, c_j)) over all tokens j before t: nothing like it was there; quadratic, a bound on
          what comparing with the slots can bring
change    s_t * exp(2 n_t), n_t the changes detected up to token t: chunks whose mean s exceeds that before by two
          of its standard deviations. What was kept before a change gives way to what comes after it

s is the `rls` innovation. Results are written after each model, and models that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo import BMojoLM, presets
from bmojo.data.synthetic import MQAR, make_task, task_record
from bmojo.eval.tasks import score_task
from bmojo.files import write_whole
from bmojo.sweep.trials import facts_kept
from bmojo.train import TrainSettings, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows

MODEL = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 256, "window": 16, "chunk_size": 16,
         "eidetic_slots": 32}  # fmt: skip
SPREAD = {"name": "mqar", "length": 192, "pairs": 16, "keys": 256, "values": 256, "gap": 32, "spread": True}
SOURCES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {  # task, admission, what is tried on it
    "text": ({**SPREAD, "filler": "text"}, "innovation", ("oracle", "values", "spans", "diverse", "rls")),
    "noise": ({**SPREAD, "filler": "noise"}, "innovation", ("oracle", "values", "spans", "diverse", "rls")),
    "drift": ({"name": "drift", "length": 256, "keys": 16, "values": 64}, "learned", ("change", "diverse", "rls")),
}
TRAINING = {"steps": 250, "batch_size": 32, "learning_rate": 3e-3}


class Chooser(nn.Module):
    """In the place of an innovation test: the same score, changed. For whole sequences alone."""

    def __init__(self, innovation: nn.Module, choice: str, marks: list[Tensor]) -> None:
        super().__init__()
        self.innovation, self.choice, self.marks = innovation, choice, marks
        self.kind = innovation.kind

    def forward(self, x: Tensor, y: Any, prediction: Any, state: Any, layout: Any) -> tuple[Tensor, Any, Any]:
        assert state is None
        score, new, loss = self.innovation(x, y, prediction, state, layout)
        match self.choice:
            case "oracle" | "values":
                score = F.pad(self.marks[0], (0, score.shape[1] - self.marks[0].shape[1])).to(score.dtype)
            case "spans":
                score = torch.maximum(score, F.pad(score[:, :-1], (1, 0)))
            case "diverse":
                c = F.normalize(x.detach().float(), dim=-1)
                alike = (c @ c.mT).square().tril(-1).amax(-1)
                score = score * (1 - alike)
            case "change":
                score = score * (2 * changes(score.unflatten(1, (layout.chunks, -1)).mean(2))).exp().repeat_interleave(
                    layout.chunk, 1
                )
        return score, new, loss


def changes(mean: Tensor) -> Tensor:
    """How many changes were detected up to each chunk, from the mean score of each [batch, chunks]."""
    found = torch.zeros_like(mean)
    for c in range(4, mean.shape[1]):
        before = mean[:, :c]
        found[:, c] = mean[:, c] > before.mean(1) + 2 * before.std(1)
    return found.cumsum(1)


def measure(choice: str, source: str, seed: int) -> dict[str, Any]:
    record, admission, _ = SOURCES[source]
    task = make_task(**record, seed=seed)
    settings = TrainSettings(**TRAINING, seq_len=task.length, seed=seed)
    torch.manual_seed(seed)
    model = BMojoLM(presets.matched("bmojo", "tiny", **MODEL, admission=admission, vocab_size=task.vocab_size))
    marks: list[Tensor] = []

    for block in model.blocks:
        block.mixer.innovation = Chooser(block.mixer.innovation, choice, marks)
    read = model.features

    def mark_and_read(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        if isinstance(task, MQAR):
            facts = torch.from_numpy(task.facts(tokens.numpy()))
            marks[:] = [facts & (tokens >= task.keys) if choice == "values" else facts]
        return read(tokens, *arguments, **options)

    model.features = mark_and_read  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        # what is trained can't be loaded without its chooser, so the folder is of no use beyond this
        trained = train(model, task_rows([task], settings.batch_size), settings, Path(folder), tensorboard=False)
    model.eval()
    return {
        "choice": choice,
        "source": source,
        "task": task_record(task),
        "admission": admission,
        "seed": seed,
        "facts_kept": facts_kept(model, task) if isinstance(task, MQAR) else None,
        "tokens_per_second": trained.tokens_per_second,
        **score_task(model, task, rows=256),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, or to go on with")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"models": []}
    report |= {"machine": machine(), "model": MODEL, "training": TRAINING}
    done = {(model["choice"], model["source"], model["seed"]) for model in report["models"]}
    for seed in map(int, options.seeds.split(",")):
        for source in options.sources.split(","):
            for choice in SOURCES[source][2]:
                if (choice, source, seed) not in done:
                    report["models"].append(found := measure(choice, source, seed))
                    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
                    print(choice, source, seed, found["accuracy"], found["facts_kept"], flush=True)


if __name__ == "__main__":
    main()
