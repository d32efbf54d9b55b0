"""`transformers.Trainer` as this library uses it; `train` alone imports it, as it needs transformers and accelerate."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bmojo.data.packing import IGNORED_LABEL
from bmojo.errors import BMojoError, DataError, DivergenceError
from bmojo.nn.init import parameter_groups
from bmojo.nn.model import BMojoLM
from bmojo.train.checkpoints import Checkpoints, Progress, cannot_write, damaged
from bmojo.train.loss import next_token_loss
from bmojo.train.processes import processes
from bmojo.train.settings import TrainSettings

Rows = Callable[[int], dict[str, np.ndarray]]

# what torch, safetensors and json raise for a file that is cut short, changed or gone
DAMAGE = (SafetensorError, UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, EOFError, OSError)


class _Share(Dataset):
    """What a process reads: of the rows of each step, from step `first` on, as many as all the others, in order.

    A resumed run needs not read what it skips.
    """

    def __init__(self, rows: Rows, settings: TrainSettings, first: int, process: int, processes: int) -> None:
        self.rows, self.settings, self.first = rows, settings, first
        self.size = settings.rows_per_process(processes)
        self.offset = process * self.size
        self.begun = False

    def __len__(self) -> int:
        return self.settings.steps * self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.begun = True
        step, place = divmod(index, self.size)
        return self.rows((self.first + step) * self.settings.batch_size + self.offset + place)


class _Objective(nn.Module):
    """The model behind its loss. Trainer would set fields of a `config` that it finds; ours is frozen, and hidden."""

    def __init__(self, model: BMojoLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], predicted: Tensor, share: float) -> Tensor:
        return next_token_loss(self.model, batch, predicted=predicted, share=share)


class NextTokenTrainer(Trainer):
    """Trains with `next_token_loss` on rows in order; a loss that is not finite ends it with DivergenceError.

    Several processes share the rows of each step, and take the gradient of the loss of all of them (DDP). The first
    alone writes, but for the random states; who resumes may be more or fewer.
    """

    def __init__(
        self,
        model: BMojoLM,
        rows: Rows,
        settings: TrainSettings,
        checkpoints: Checkpoints,
        progress: Progress,
        on_step: Callable[[int, float], None] | None,
        writer: Any,
    ) -> None:
        self.settings, self.checkpoints, self.progress = settings, checkpoints, progress
        state = processes()
        self.data = _Share(rows, settings, progress.steps, state.process_index, state.num_processes)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=settings.betas
        )
        args = TrainingArguments(
            output_dir=str(checkpoints.folder),
            max_steps=settings.steps,
            per_device_train_batch_size=self.data.size,
            max_grad_norm=settings.grad_clip,
            seed=settings.seed,
            save_steps=settings.checkpoint_every,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,
            ignore_data_skip=True,  # _Share does it
            ddp_find_unused_parameters=_has_unused(model),
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
        )
        # Trainer would put the model on all GPUs that it sees, in DataParallel: a loss of each part of the batch where
        # `compute_loss` takes one, and times and memory of several devices. No option says otherwise.
        args._n_gpu = 1
        super().__init__(
            model=_Objective(model),
            args=args,
            train_dataset=self.data,
            optimizers=(optimizer, LambdaLR(optimizer, settings.learning_rate_ratio)),
            callbacks=[_Watch(progress, on_step, writer)],
        )
        self.remove_callback(PrinterCallback)

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start. Raises CheckpointError if the checkpoint can't be read."""
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except DAMAGE as error:  # all of a checkpoint is read before the first row
            other = isinstance(error, BMojoError | torch.OutOfMemoryError)
            if isinstance(error, OSError):  # not a full disk, nor a file that may not be read
                other = error.errno not in (errno.ENOENT, errno.EINVAL, errno.EIO)
            if checkpoint is None or self.data.begun or other:
                raise
            raise damaged(checkpoint, error) from error

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.data,
            batch_size=self.data.size,
            collate_fn=self._stack,
            generator=torch.Generator(),  # of its own: drawing a seed for workers would move the global one
        )

    def _stack(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        if batch["tokens"].shape[1] != self.settings.seq_len:
            raise DataError(f"rows must have seq_len={self.settings.seq_len} tokens, got {batch['tokens'].shape[1]}")
        return batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        count = self.accelerator.num_processes
        predicted = self.accelerator.reduce((inputs["labels"] != IGNORED_LABEL).sum(), "sum").clamp(min=1)
        loss = model(inputs, predicted, 1 / count)
        value, step = self.accelerator.reduce(loss.detach(), "sum").item(), self.progress.steps + 1
        if not math.isfinite(value):
            last = f"the last finite one was {self.progress.losses[-1]:.4g}" if step > 1 else "it never was finite"
            raise DivergenceError(
                f"the loss is {value} at step {step}, {last}; "
                f"use a lower learning rate (it is {self.settings.learning_rate:g}) or more warmup steps"
            )
        self.progress.losses.append(value)
        return loss * count  # DDP and the log take the mean over processes, of what is to be summed

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.checkpoints.of_step(self.progress.steps)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # now all parts of it are written
            if self.accelerator.is_main_process:
                self.checkpoints.complete(folder, self.progress)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the system says
            failure = cannot_write(f"the checkpoint of step {self.progress.steps}", folder, error)
            self.checkpoints.discard(folder)  # after a look at the space left
            raise failure from error
        self.progress.restart_clock()


def _has_unused(model: BMojoLM) -> bool:
    """Whether some parameters get no gradient: those of an SSM that only the innovation test reads."""
    parts = map(model.config.parts, model.config.kinds)
    return any(part.ssm and part.attention and not part.fading for part in parts)


class _Watch(TrainerCallback):
    """Notes the progress, tells the caller of it, and writes what is logged to TensorBoard."""

    def __init__(self, progress: Progress, on_step: Callable[[int, float], None] | None, writer: Any) -> None:
        self.progress, self.on_step, self.writer = progress, on_step, writer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.progress.restart_clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.progress.note_step()
        if self.on_step is not None:
            self.on_step(self.progress.steps, self.progress.losses[-1])
        self.progress.restart_clock()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.writer is not None:
            for name in ("loss", "grad_norm", "learning_rate"):
                if logs and name in logs:
                    self.writer.add_scalar(f"train/{name}", logs[name], state.global_step)
