"""How a model is trained, apart from the model and the data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bmojo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `bmojo.train.train`; with the model's configuration they identify a run.

    The learning rate rises linearly over `warmup_steps`, then falls on a cosine to `min_learning_rate_ratio` of itself.
    Raises ConfigError for a value out of range.
    """

    steps: int
    batch_size: int  # rows a step, of all processes together
    seq_len: int  # tokens a row
    learning_rate: float = 3e-3
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int | None = None  # None: a twentieth of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    seed: int = 0
    checkpoint_every: int = 200  # steps
    log_every: int = 10  # steps; the loss is logged as the mean of so many

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "seq_len", "checkpoint_every", "log_every"):
            self._whole(name, least=1)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", self.steps // 20)
        for name in ("warmup_steps", "seed"):
            self._whole(name, least=0)
        self._number("learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        self._number("min_learning_rate_ratio", self.min_learning_rate_ratio, 0, 1)
        self._number("weight_decay", self.weight_decay, 0, math.inf)
        self._number("grad_clip", self.grad_clip, 0, math.inf)
        if len(self.betas) != 2:
            raise ConfigError(f"betas must be two numbers, got {self.betas}")
        for beta in self.betas:
            self._number("betas", beta, 0, 1)
        if self.warmup_steps > self.steps:  # type: ignore[operator]
            raise ConfigError(f"warmup_steps must be at most steps ({self.steps}), got {self.warmup_steps}")

    def _whole(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")

    @staticmethod
    def _number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
        if not isinstance(value, int | float) or not low <= value <= high or (open_low and value == low):
            above = f"above {low}" if open_low else f"at least {low}"
            raise ConfigError(
                f"{name} must be {above}{'' if high == math.inf else f' and at most {high}'}, got {value!r}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def rows_per_process(self, processes: int) -> int:
        """Rows of a step for each of so many processes. Raises ConfigError if they can't be shared out evenly."""
        if self.batch_size % processes:
            raise ConfigError(
                f"batch_size must be a multiple of the number of processes ({processes}), which share each batch, "
                f"got {self.batch_size}"
            )
        return self.batch_size // processes

    def learning_rate_ratio(self, step: int) -> float:
        """Share of `learning_rate` that step `step` (counted from 0) uses."""
        assert self.warmup_steps is not None
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.min_learning_rate_ratio
        return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "betas": list(self.betas)}
