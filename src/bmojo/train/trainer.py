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
from bmojo.train.processes import processes
from bmojo.train.settings import TrainSettings


@dataclass(frozen=True)
class TrainRecord:
    """What training gave and cost, all parts of an interrupted run together."""

    loss: list[list[float]]  # [step, mean nats per predicted token of the log_every steps up to it]
    tokens_trained: int
    tokens_per_second: float  # of the median step, without the first two of a part
    seconds: float  # in training steps
    peak_memory_bytes: int  # allocated on the accelerator, or resident in the process on a CPU; of the first process


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
    DivergenceError if the loss is not finite, BMojoError if the disk is full.

    Started by torchrun, the processes share the rows of each step; all must call this, with the same model and
    arguments, and see the same folder. The losses are those of all rows, and differ from those of one process in
    rounding alone. The first process writes, and calls `on_step`; all get the model and the record. Another number of
    processes may go on. Raises ConfigError if batch_size is not a multiple of their number.
    """
    state = processes()
    settings.rows_per_process(state.num_processes)
    folder = Path(folder)
    identity = {"settings": settings.to_dict(), "config": model.config.to_dict()}
    finished = folder / "train.json"
    if finished.exists():
        record = _finished(finished, identity)
        model.load_state_dict(BMojoLM.load(folder / "model").state_dict())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return record
    with state.main_process_first():  # the others find the folder in order
        checkpoints = Checkpoints(folder / "checkpoints", identity)
        newest, progress = checkpoints.newest()
    hf = optional_module("bmojo.train.hf", "training")
    writer = None
    try:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        if tensorboard and state.is_main_process:
            summary = optional_module("torch.utils.tensorboard", "logging to TensorBoard").SummaryWriter
            writer = summary(str(folder / "tensorboard"), purge_step=progress.steps + 1)
        watcher = on_step if state.is_main_process else None
        trainer = hf.NextTokenTrainer(model, rows, settings, checkpoints, progress, watcher, writer)
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
    if state.is_main_process:
        model.save(folder / "model")
        write_whole(finished, (json.dumps({"record": asdict(record), **identity}, indent=1) + "\n").encode())
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
    state.wait_for_everyone()
    return _finished(finished, identity)


def _finished(path: Path, identity: dict[str, Any]) -> TrainRecord:
    content = read_json(path)
    require_same_run(content, identity, path)
    try:
        return TrainRecord(**content["record"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a training record: {error}; use another folder") from error
