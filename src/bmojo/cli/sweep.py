"""`bmojo sweep`: the family over a grid of settings, on a synthetic task."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from bmojo import presets
from bmojo.cli.options import AsJson, Size, parse_value, whole_numbers
from bmojo.errors import BMojoError, ConfigError

FOLDER = Path("runs/sweep")
Values = list[str] | None


def sweep(
    task: Annotated[str, typer.Argument(help="mqar, in_context_recall, selective_copying, needle, ...")],
    models: Annotated[str, typer.Option(help="Presets, separated by commas.")] = ",".join(presets.COMPARED),
    size: Size = "tiny",
    settings: Annotated[
        Values,
        typer.Option(
            "--set",
            metavar="NAME=V1,V2,...",
            help="A setting of the task, of training (steps, batch_size, learning_rate, ...) or of the model; several "
            "values are an axis of the grid, NAME/NAME=V/V,V/V one of settings that change together. May be repeated.",
        ),
    ] = None,
    state_bytes: Annotated[
        str | None, typer.Option(help="Size the memory of each model to at most so many bytes; several are an axis.")
    ] = None,
    train_on: Annotated[
        Values, typer.Option(metavar="NAME=V1,V2,...", help="Let the batches cycle through variants of the task.")
    ] = None,
    eval_on: Annotated[
        Values, typer.Option(metavar="NAME=V1,V2,...", help="Score the trained models on variants of the task, too.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of task, weights and training alike.")] = "0",
    eval_rows: Annotated[int, typer.Option(help="Sequences of an evaluation.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Processes; `torchrun -m bmojo sweep` does the same.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads a worker; the cores shared out if left out.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the folder in runs/sweep; the task's if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder, if it is elsewhere.")] = None,
    as_json: AsJson = False,
) -> None:
    from bmojo.sweep.grid import Sweep
    from bmojo.sweep.job import Job
    from bmojo.sweep.report import write_report
    from bmojo.sweep.workers import launch, leave_group, share_cores, started_by_torchrun

    if name is not None and out is not None:
        raise ConfigError(f"--name is that of a folder in {FOLDER}; give it or --out, not both")
    job = Job(
        Sweep(
            task=task,
            models=tuple(part.strip() for part in models.split(",") if part.strip()),
            size=size,
            axes=tuple(_axis(task, text) for text in settings or ()),
            state_bytes=_whole("--state-bytes", state_bytes) if state_bytes is not None else (),
            train_on=tuple(_axis(task, text, "--train-on") for text in train_on or ()),
            eval_on=tuple(change for text in eval_on or () for change in _axis(task, text, "--eval-on")),
            seeds=_whole("--seeds", seeds),
            eval_rows=eval_rows,
        ),
        out or FOLDER / (name or task),
        command=shlex.join(["bmojo", *sys.argv[1:]]),
    )
    first = True
    if started_by_torchrun():
        first, workers = leave_group(threads).rank == 0, 1
    elif workers == 1:
        share_cores(1, threads)
    if first:
        for note in job.notes:
            warnings.warn(note, stacklevel=1)
    if workers > 1 and not all(map(job.finished, job.trials)):
        launch(workers, _work, job, threads)
    else:
        job.work(_tell)
    if first:
        results = job.write_results()
        write_report(job.folder, results)
        table = (job.folder / "table.md").read_text(encoding="utf-8")
        print(json.dumps(results, indent=1) if as_json else table)
        if not as_json:
            print(f"in {job.folder}: results.json, table.md, figures/")


def _work(job: Any, threads: int | None) -> str | None:
    """What a worker does, in a process of its own."""
    from bmojo.sweep.workers import leave_group

    leave_group(threads)
    try:
        job.work(_tell)
    except BMojoError as error:
        return str(error)
    except KeyboardInterrupt:  # it reaches all; the launcher stops us once more, which must not disturb the end
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    return None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _axis(task: str, text: str, option: str = "--set") -> tuple[dict[str, Any], ...]:
    """`pairs=8,16`, or `length/pairs=128/8,256/16`, as an axis of the grid."""
    from bmojo.sweep.grid import require_known, settings_of

    names, equals, values = text.partition("=")
    if not equals:
        raise ConfigError(f"{option} takes NAME=VALUE,VALUE,..., got {text!r}; for example {option} pairs=8,16")
    listed, known = names.split("/"), settings_of(task)
    require_known(listed, known)
    axis = []
    for value in filter(None, map(str.strip, values.split(","))):
        parts = value.split("/")
        if len(parts) != len(listed):
            raise ConfigError(f"{option} {names} takes values of {len(listed)} parts with / between, got {value!r}")
        axis.append({name: _value(name, part, known[name][1]) for name, part in zip(listed, parts, strict=True)})
    return tuple(axis)


def _value(name: str, text: str, kind: str) -> Any:
    return parse_value(name, text.replace("+", ",") if kind.startswith("tuple") else text, kind)


def _whole(option: str, text: str) -> tuple[int, ...]:
    values = whole_numbers(option, text)
    if not values:
        raise ConfigError(f"{option} must have at least one value, got none; for example {option} 1,2")
    return values
