"""Trains a model in a folder: resumable, reproducible, and done only once.

folder/model/        the trained model                    folder/checkpoints/  while it runs (`bmojo.train.checkpoints`)
folder/train.json    record, settings and configuration   folder/tensorboard/  loss, gradient norm, learning rate
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.errors import CheckpointError
from bmojo.files import optional_module, write_whole
from bmojo.nn.model import BMojoLM
from bmojo.train.checkpoints import Checkpoints, cannot_write, read_json, require_same_run
from bmojo.train.memory import reset_peak_memory
from bmojo.train.settings import TrainSettings


@dataclass(frozen=True)
class TrainRecord:
    """What training gave and cost, all parts of an interrupted run together."""

    loss: list[list[float]]  # [step, mean nats per predicted token of the log_every steps up to it]
    tokens_trained: int
    tokens_per_second: float  # of the median step, without the first two of a part
    seconds: float  # in training steps
    peak_memory_bytes: int  # allocated on the accelerator, or resident in the process on a CPU


def train(
    model: BMojoLM,
    rows: Callable[[int], dict[str, np.ndarray]],
    settings: TrainSettings,
    folder: Path,
    *,
    on_step: Callable[[int, float], None] | None = None,
    tensorboard: bool = True,
) -> TrainRecord:
    """Train `model`, in place, and write it to `folder`; a folder that is finished already gives its model and record.

    rows(i), 0 <= i < steps * batch_size, is training row i: int64 [seq_len] `tokens`, `labels` and optionally
    `document_ids` (see `next_token_loss`). It must depend on i alone. `on_step(step, loss)` is called after each step,
    counted from 1.

    A run that was stopped, at any moment, goes on from its newest complete checkpoint, with the same losses and weights
    to the bit as one that never stopped (same machine and threads, on a CPU). Raises CheckpointError, and overwrites
    nothing, if the folder belongs to other settings or another configuration, or the newest checkpoint is damaged;
    BMojoError if the loss is not finite or the disk is full.
    """
    folder = Path(folder)
    identity = {"settings": settings.to_dict(), "config": model.config.to_dict()}
    finished = folder / "train.json"
    if finished.exists():
        record = _finished(finished, identity)
        model.load_state_dict(BMojoLM.load(folder / "model").state_dict())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return record
    checkpoints = Checkpoints(folder / "checkpoints", identity)
    newest, progress = checkpoints.newest()
    hf = optional_module("bmojo.train.hf", "training")
    writer = None
    try:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            summary = optional_module("torch.utils.tensorboard", "logging to TensorBoard").SummaryWriter
            writer = summary(str(folder / "tensorboard"), purge_step=progress.steps + 1)
        trainer = hf.NextTokenTrainer(model, rows, settings, checkpoints, progress, on_step, writer)
        reset_peak_memory()
        trainer.go_on(newest)
        progress.note_memory()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise cannot_write("what training logs", folder, error) from error
    finally:
        if writer is not None:
            writer.close()
    record = TrainRecord(
        loss=progress.mean_losses(settings.log_every),
        tokens_trained=settings.steps * settings.tokens_per_step,
        tokens_per_second=settings.tokens_per_step / progress.median_seconds(),
        seconds=float(sum(progress.seconds)),
        peak_memory_bytes=progress.peak_memory_bytes,
    )
    model.save(folder / "model")
    write_whole(finished, (json.dumps({"record": asdict(record), **identity}, indent=1) + "\n").encode())
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    return record


def _finished(path: Path, identity: dict[str, Any]) -> TrainRecord:
    content = read_json(path)
    require_same_run(content, identity, path)
    try:
        return TrainRecord(**content["record"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a training record: {error}; use another folder") from error
