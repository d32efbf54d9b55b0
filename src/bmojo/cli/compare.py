"""`bmojo compare`: the main job."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bmojo import presets
from bmojo.cli.options import Errors, Seed, Text, Threads, use_threads
from bmojo.data import load_tokenizer
from bmojo.errors import ConfigError

FOLDER = Path("runs/compare")


def compare(
    models: Annotated[str, typer.Option(help="Presets, separated by commas.")] = ",".join(presets.COMPARED),
    suite: Annotated[str, typer.Option(help="'text', 'recall', or both separated by a comma.")] = "text,recall",
    profile: Annotated[
        str, typer.Option(help="'quick' (within 15 minutes on 2 cores), 'small' (about 2 hours), 'full' (GPUs).")
    ] = "quick",
    text: Text = "stdlib",
    tokenizer: Annotated[str, typer.Option(help="'bytes' or a tokenizers .json file.")] = "bytes",
    name: Annotated[
        str | None, typer.Option(help="Of the folder in runs/compare; made of profile and text if left out.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    errors: Errors = "strict",
) -> None:
    from bmojo.compare.job import Job, run
    from bmojo.compare.report import summary_table

    use_threads(threads)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("compare runs in one process, as it measures time and memory; start it without torchrun")
    made = name or re.sub(r"[^\w.-]+", "-", f"{profile}-{Path(text).name or text}")
    job = Job(
        folder=FOLDER / made,
        profile=profile,
        models=_listed(models),
        suites=_listed(suite),
        text=text,
        errors=errors,
        seed=seed,
        command=" ".join(["bmojo", *sys.argv[1:]]),
    )
    console = Console(stderr=True)
    with Bars(console) as bars:
        results = run(job, load_tokenizer(tokenizer), bars)
    print(summary_table(results))
    print(f"\nreport: {job.folder / 'report.html'}")


def _listed(names: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in names.split(",") if part.strip())


class Bars:
    """A bar for the whole job with the time left, and a line for each model: finished, or with its loss as it falls."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description:<24}"), BarColumn(), "[progress.percentage]{task.percentage:>3.0f}%")
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self.finished = 0.0

    def __enter__(self) -> Bars:
        self.progress.start()
        self.job = self.progress.add_task("all models", total=None, note="")
        self.line: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, total: float) -> None:
        self.progress.update(self.job, total=total)

    def model(self, name: str, steps: int) -> None:
        self.line = self.progress.add_task(name, total=steps, note="")

    def step(self, step: int, loss: float) -> None:
        self.progress.update(self.line, completed=step, note=f"step {step}  loss {loss:.3f}")
        self.progress.update(self.job, completed=self.finished + step)

    def stage(self, what: str) -> None:
        self.progress.update(self.job if self.line is None else self.line, note=what)

    def done(self, entry: dict[str, Any], work: float) -> None:
        self.finished += work
        self.progress.update(self.job, completed=self.finished)
        self.progress.remove_task(self.line)
        self.line = None
        self.console.print(
            f"[green]finished[/] {entry['name']:<20} {_headline(entry)}", highlight=False, soft_wrap=True
        )


def _headline(entry: dict[str, Any]) -> str:
    """What a finished model came to, in one line."""
    scores, speed = entry["eval"], f"{entry['train']['tokens_per_second']:,.0f} tokens/s"
    if entry["suite"] == "text":
        return f"{scores['bits_per_byte']:.3f} bits per byte, {speed}"
    rows = (f"{row['accuracy']:.2f} at {row['distance']}" for row in scores["recall"])
    return f"recall {', '.join(rows)}, {speed}"
