"""One trial: trained in a folder of its own, scored, and kept as an entry that is never made again.

trials/<id>/task.json                 the task that it is trained for
            model/, train.json        checkpoints/ while it trains
            entry.json                what it came to
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import bmojo
from bmojo import presets
from bmojo.data.synthetic import EVALUATION, make_task
from bmojo.errors import CheckpointError, DivergenceError
from bmojo.eval.tasks import score_task
from bmojo.files import write_whole
from bmojo.nn.count import parameters
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM
from bmojo.sweep.grid import Trial
from bmojo.train import train
from bmojo.train.checkpoints import read_json
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows

TRACED_ROWS = 16
Entry = dict[str, Any]


def read_entry(trial: Trial, folder: Path) -> Entry | None:
    """What a trial came to, as far as it has been run.

    Raises CheckpointError if it can't be read, or was made when a default was another.
    """
    path = folder / "entry.json"
    if not path.exists():
        return None
    entry = read_json(path)
    now, then = _flat(trial.content), _flat(entry.get("trial", {}))
    for name in now.keys() & then.keys():
        if now[name] != then[name]:
            raise CheckpointError(
                f"{path} was made with {name}={json.dumps(then[name])}, which is now {json.dumps(now[name])} if left "
                f"out; use another --name, or set {name}"
            )
    return entry


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    tasks = ((name, i, value) for i, record in enumerate(content.get("tasks", ())) for name, value in record.items())
    parts = {**content.get("configuration", {}), **content.get("settings", {})}
    return parts | {f"{name} of task {i}": value for name, i, value in tasks}


def missing(trial: Trial, entry: Entry | None, rows: int) -> list[dict[str, Any]]:
    """The evaluations of a trial that its entry lacks; none of one that failed."""
    if entry is not None and "failed" in entry:
        return []
    return [record for record in trial.evaluations if found(entry, record, rows) is None]


def found(entry: Entry | None, record: dict[str, Any], rows: int) -> dict[str, Any] | None:
    """The score on a task in an entry."""
    scores = () if entry is None else entry.get("evaluations", ())
    return next((score for score in scores if (score["task"], score["rows"]) == (record, rows)), None)


def run_trial(trial: Trial, folder: Path, rows: int) -> Entry:
    """Train and score it, or what is left of that. Divergence, or too little memory, makes an entry with the
    key `failed`.

    Raises BMojoError if the disk is full or a checkpoint damaged.
    """
    try:
        entry = _run(trial, folder, rows)
    except (DivergenceError, torch.OutOfMemoryError) as error:
        entry = {"trial": trial.content, "failed": str(error).partition("\n")[0]}
    write_whole(folder / "entry.json", (json.dumps(entry, indent=1) + "\n").encode())
    return entry


def _run(trial: Trial, folder: Path, rows: int) -> Entry:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    entry = read_entry(trial, folder)
    if entry is not None:
        model = BMojoLM.load(folder / "model", device)
    else:
        settings = trial.settings
        torch.manual_seed(settings.seed)
        model = BMojoLM(trial.config).to(device)
        variants = [make_task(**record) for record in trial.tasks]
        record = train(model, task_rows(variants, settings.batch_size), settings, folder, tensorboard=False)
        write_whole(folder / "task.json", (json.dumps(trial.evaluations[0], indent=1) + "\n").encode())
    model.eval()
    if entry is None:
        task = make_task(**trial.evaluations[0])
        entry = {
            "trial": trial.content,
            "parameters": parameters(trial.config),
            "state_bytes": presets.state_bytes(trial.config, settings.seq_len),
            "train": vars(record),
            "facts_kept": facts_kept(model, task) if hasattr(task, "facts") else None,
            "machine": machine(),
            "bmojo": bmojo.__version__,
            "evaluations": [],
        }
    for wanted in missing(trial, entry, rows):
        score = score_task(model, make_task(**wanted), rows=rows)
        entry["evaluations"].append({"task": wanted, "rows": rows, **score})
    return entry


@torch.inference_mode()
def facts_kept(model: BMojoLM, task: Any) -> list[float] | None:
    """For each layer with eidetic slots, the share of the task's fact tokens that are in them at the end.

    Over TRACED_ROWS rows of evaluation; None if no layer has slots.
    """
    tokens = task.batch(EVALUATION, TRACED_ROWS)["tokens"]
    facts = torch.from_numpy(task.facts(tokens))
    trace = Trace()
    model.features(torch.from_numpy(tokens).to(model.embed.weight.device), trace=trace)
    kept = [positions.cpu() for positions in trace.kept]
    shares = [(facts.gather(1, p.clamp(min=0)) & (p >= 0)).sum() / facts.sum().clamp(min=1) for p in kept]
    return [float(share) for share in shares] or None
