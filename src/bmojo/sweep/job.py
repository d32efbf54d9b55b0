"""The trials of a sweep in a folder, by one worker or by several that share it.

    runs/sweep/<name>/trials/<id>/        see `bmojo.sweep.trials`
                      locks/              whose trial is whose: the system frees a lock when its process ends
                      results.json        all finished trials of the grid      table.md  figures/

Every trial is run once and then only read, whatever grid asks for it: a sweep that was stopped goes on where it was,
and one with more values trains the new ones only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import bmojo
from bmojo.errors import CheckpointError
from bmojo.files import full_disk_told, optional_module, write_whole
from bmojo.sweep.grid import Sweep, Trial
from bmojo.sweep.trials import Entry, found, missing, read_entry, run_trial
from bmojo.train.machine import machine


@dataclass
class Job:
    """A sweep in its folder. Raises ConfigError, DataError or CheckpointError if it can't be run there."""

    sweep: Sweep
    folder: Path
    command: str = "bmojo sweep"

    def __post_init__(self) -> None:
        for module in ("transformers", "accelerate", "matplotlib"):
            optional_module(module, "bmojo sweep")  # now, not after the first trial has trained
        self.trials, self.notes = self.sweep.expand()
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if names and "trials" not in names:
            raise CheckpointError(f"{self.folder} holds something that is no sweep; use another --name")

    def folder_of(self, trial: Trial) -> Path:
        return self.folder / "trials" / trial.id

    def finished(self, trial: Trial) -> Entry | None:
        """The entry of a trial of which nothing is left to do."""
        entry = read_entry(trial, self.folder_of(trial))
        return entry if entry is not None and not missing(trial, entry, self.sweep.eval_rows) else None

    def work(self, tell: Callable[[str], None]) -> None:
        """Run the trials, one by one: first those that nobody runs, then those that others leave undone. All are
        finished in the end; `tell` gets a line for each of our own."""
        with full_disk_told(self.folder):
            (self.folder / "trials").mkdir(parents=True, exist_ok=True)
            for trial, patient in [*((t, False) for t in self.trials), *((t, True) for t in self.trials)]:
                if self.finished(trial):
                    continue
                try:
                    with self._lock(trial.id, blocking=patient):
                        if self.finished(trial):  # since we looked
                            continue
                        entry = run_trial(trial, self.folder_of(trial), self.sweep.eval_rows)
                except Timeout:
                    continue
                results = self.write_results()
                tell(f"{len(results['trials'])}/{len(self.trials)} {_line(trial, entry)}")

    def _lock(self, name: str, *, blocking: bool = True) -> FileLock:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name, blocking=blocking)

    def write_results(self) -> dict[str, Any]:
        """Bring results.json up to date with the finished trials, and return it."""
        with self._lock("results"):
            results = self.results()
            write_whole(self.folder / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
        return results

    def results(self) -> dict[str, Any]:
        sweep = self.sweep
        fixed = {name: value for axis in sweep.axes for name, value in axis[0].items() if name not in sweep.varied}
        done = [(trial, entry) for trial in self.trials if (entry := self.finished(trial)) is not None]
        return {
            "version": 1,
            "name": self.folder.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "bmojo": bmojo.__version__,
            "machine": machine(),
            "task": sweep.task,
            "size": sweep.size,
            "fixed": fixed,
            "varied": sweep.varied,
            "train_on": list(map(list, sweep.train_on)),
            "eval_on": list(sweep.eval_on),
            "seeds": list(sweep.seeds),
            "notes": self.notes,
            "planned": len(self.trials),
            "trials": [self._result(trial, entry) for trial, entry in done],
        }

    def _result(self, trial: Trial, entry: Entry) -> dict[str, Any]:
        kept = {name: value for name, value in entry.items() if name not in ("trial", "evaluations")}
        result = {"id": trial.id, "model": trial.model, "varied": trial.varied, "seed": trial.settings.seed, **kept}
        if "failed" not in entry:
            scores = [found(entry, record, self.sweep.eval_rows) for record in trial.evaluations]
            result["evaluations"] = [score for score in scores if score is not None]
        return result | trial.content


def _line(trial: Trial, entry: Entry) -> str:
    seed = f", seed {trial.settings.seed}"
    if "failed" in entry:
        return f"{trial.name}{seed}: failed: {entry['failed']}"
    accuracy, speed = entry["evaluations"][0]["accuracy"], entry["train"]["tokens_per_second"]
    return f"{trial.name}{seed}: accuracy {accuracy:.3f}, {speed:,.0f} tokens/s, {entry['train']['seconds']:.0f} s"
