"""`bmojo eval mad`: a task of MAD (arXiv 2403.17844) at the settings of its baseline and the harder ones."""

from __future__ import annotations

from typing import Annotated

import typer

from bmojo.cli.checkpoint import open_model, trained_task
from bmojo.cli.options import AsJson, Checkpoint, Seed, Threads, use_threads
from bmojo.cli.scores import OTHER, TRAINED, BatchSize, Rows, Scores
from bmojo.errors import ConfigError, nearest


def mad(
    checkpoint: Checkpoint,
    task: Annotated[
        str | None,
        typer.Option(help="in_context_recall, noisy_recall, ...; what the model was trained on if left out."),
    ] = None,
    rows: Rows = 64,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    from bmojo.data.synthetic import MAD_HARDER, make_task, task_record

    if task is not None and task not in MAD_HARDER:
        raise ConfigError(f"unknown task {task!r} of --task; {nearest(task, MAD_HARDER)}")
    use_threads(threads)
    model, folder = open_model(checkpoint)
    trained_on = trained_task(folder)
    name = task or ("nothing that is known" if trained_on is None else trained_on["name"])
    if name not in MAD_HARDER:
        tasks = ", ".join(MAD_HARDER)
        raise ConfigError(f"the model was trained on {name}, which is not of MAD; name a task with --task: {tasks}")
    baseline = task_record(make_task(name))
    known = trained_on is not None and trained_on["name"] == name
    base = trained_on if trained_on is not None and known else baseline
    scores = Scores(model, base, rows=rows, batch_size=batch_size, seed=seed)
    for field, harder in MAD_HARDER[name].items():
        scores.add(({field: value} for value in (baseline[field], *harder)), same_ids=known)
    scores.show(TRAINED if known else OTHER, trained_on, as_json)
