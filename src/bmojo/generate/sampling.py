"""How the next token is chosen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bmojo.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The most likely token (temperature 0), or one drawn from softmax(logits / temperature) cut to the `top_k` most
    likely tokens and then to the fewest that have probability `top_p`.

    The draw for the token at position p depends on (seed, p) alone, so what is drawn does not depend on how a stream
    was cut, stopped or saved. Raises ConfigError for a setting out of range; warns of one that greedy choice ignores.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be at least 0 and finite, got {self.temperature}; 0 takes the most likely token"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}; leave it out for no limit")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        ignored = [name for name, given in (("top_p", self.top_p < 1), ("top_k", self.top_k is not None)) if given]
        if self.temperature == 0 and ignored:
            warnings.warn(f"ignored: {' and '.join(ignored)}; temperature 0 takes the most likely token", stacklevel=3)

    def choose(self, logits: Tensor, position: int) -> int:
        """The token at `position`, by its logits [vocab_size]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.double().cpu() / self.temperature
        order = scaled.argsort(descending=True, stable=True)[: self.top_k]
        below = scaled[order].softmax(0).numpy().cumsum()
        kept = 1 + int(np.searchsorted(below, self.top_p)) if self.top_p < 1 else len(below)
        below = below[:kept]
        draw = np.random.default_rng((self.seed, position)).random() * below[-1]
        return int(order[min(int(np.searchsorted(below, draw, side="right")), len(below) - 1)])
