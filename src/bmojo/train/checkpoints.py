"""Checkpoints of a run in progress: each counts only once its marker, written last, is there.

checkpoints/checkpoint-N/...           what transformers.Trainer writes: weights, optimiser, scheduler, random states
checkpoints/checkpoint-N/progress.npy  float64 [N, 3]: loss, seconds, and whether the step's time is typical
checkpoints/checkpoint-N/complete      JSON: the settings and configuration of the run, peak memory so far, and the
                                       names of the other files: Transformers would go on without some of them
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.errors import BMojoError, CheckpointError
from bmojo.train.memory import peak_memory_bytes

KEPT = 2
UNTYPICAL_STEPS = 2  # the first of a part: they warm up caches and allocators


class Progress:
    """Losses and times of the steps so far, over all parts of an interrupted run."""

    def __init__(self, rows: np.ndarray | None = None, peak_memory_bytes: int = 0) -> None:
        rows = np.empty((0, 3)) if rows is None else rows
        self.losses, self.seconds, self.typical = (column.tolist() for column in rows.T)
        self.peak_memory_bytes = peak_memory_bytes
        self._first = self.steps
        self._clock = 0.0

    @property
    def steps(self) -> int:
        return len(self.seconds)

    def restart_clock(self) -> None:
        self._clock = time.perf_counter()

    def note_step(self) -> None:
        """A step is done whose loss is in `losses` already."""
        self.typical.append(float(self.steps - self._first >= UNTYPICAL_STEPS))
        self.seconds.append(time.perf_counter() - self._clock)

    def note_memory(self) -> None:
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes())

    def rows(self) -> np.ndarray:
        return np.array([self.losses, self.seconds, self.typical]).T

    def median_seconds(self) -> float:
        """Of the typical steps, or of all if there are none."""
        _, seconds, typical = self.rows().T
        return float(np.median(seconds[typical > 0] if typical.any() else seconds))

    def mean_losses(self, every: int) -> list[list[float]]:
        """[step, mean loss of the steps up to it], every `every` steps and at the end."""
        ends = [*range(every, self.steps, every), self.steps]
        return [[end, float(np.mean(self.losses[start:end]))] for start, end in zip([0, *ends], ends, strict=False)]


class Checkpoints:
    """The checkpoints of the run that `identity` (settings and config, as JSON would give them) describes.

    Raises CheckpointError if those in the folder belong to another run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        for checkpoint in self._complete():
            require_same_run(read_json(checkpoint / "complete"), identity, checkpoint)

    def of_step(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def newest(self) -> tuple[Path | None, Progress]:
        """The newest complete checkpoint and its progress; what a crash left half written is deleted."""
        complete = self._complete()
        for path in self._all():
            if path not in complete:
                shutil.rmtree(path)
        if not complete:
            return None, Progress()
        newest = complete[-1]
        marker = read_json(newest / "complete")
        try:
            for name in marker.get("files", ()):  # older markers have none
                if not (newest / name).is_file():
                    raise FileNotFoundError(f"{name} is missing")
            return newest, Progress(np.load(newest / "progress.npy"), int(marker["peak_memory_bytes"]))
        except KeyError as error:
            raise damaged(newest, ValueError(f"its marker lacks {error}")) from error
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise damaged(newest, error) from error

    def complete(self, folder: Path, progress: Progress) -> None:
        """Make the checkpoint in `folder` count, and delete all but the last KEPT."""
        progress.note_memory()
        np.save(folder / "progress.npy", progress.rows())
        files = sorted(path.name for path in folder.iterdir())
        for name in files:
            _sync(folder / name)
        marker = folder / "complete.partial"
        notes = {"peak_memory_bytes": progress.peak_memory_bytes, "files": files}
        marker.write_text(json.dumps({**self.identity, **notes}))
        _sync(marker)
        marker.rename(folder / "complete")
        _sync(folder)
        for old in self._complete()[:-KEPT]:
            self.discard(old)

    @staticmethod
    def discard(folder: Path) -> None:
        """Delete a checkpoint; stopped at any moment, what is left does not count."""
        (folder / "complete").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def _complete(self) -> list[Path]:
        return [path for path in self._all() if (path / "complete").is_file()]


def require_same_run(found: dict[str, Any], identity: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError, naming the first setting that differs, unless `found` has what `identity` has."""
    for part, expected in identity.items():
        there = found.get(part)
        for name, value in expected.items():
            got = there.get(name) if isinstance(there, dict) else None
            if got != value:
                raise CheckpointError(
                    f"{where} was made with {name}={json.dumps(got)}, this run has {name}={json.dumps(value)}; "
                    "use another folder, or the same settings to go on"
                )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object at `path`, or CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; delete it, or use another folder") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}; use another folder")
    return content


def damaged(checkpoint: Path, error: Exception) -> CheckpointError:
    """The error for a complete checkpoint that can't be read."""
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__  # torch adds advice for others
    return CheckpointError(f"{checkpoint} is damaged ({reason}); delete it to go on from the one before")


def cannot_write(what: str, path: Path, error: Exception) -> BMojoError:
    """The error for `what` that could not be written to `path`."""
    if shutil.disk_usage(path.parent if path.parent.exists() else ".").free < 2**20:
        reason = "no space left on the disk"
    else:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return BMojoError(
        f"can't write {what} to {path}: {reason}; what was finished before stays valid: "
        "free some space and run the same again"
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
