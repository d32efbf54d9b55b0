"""MAD's memorisation: one map from keys to values for all sequences, to be learned into the weights.

    k3 ? k5 ? k3 ? k0 ? ...        answers at each ?: the value of the key before it

The values are never shown: only the map of this seed, the same in training and evaluation, has them.
Source: Poli et al. 2024, arXiv 2403.17844.

Token ids: keys, then values, then `?`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, ask, unasked


@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """One of the `symbols` asks; the rest are half keys, half values. `distance` is that to the key, 1."""

    length: int = 32
    symbols: int = 256

    def check(self) -> None:
        self.require(self.length % 2 == 0 and self.length >= 2, f"length must be even, 2 or more, got {self.length}")
        self.require(self.symbols >= 3, f"symbols must be at least 3, got {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 1 - self._keys)

    @property
    def _keys(self) -> int:
        return (self.symbols - 1) // 2

    def values(self) -> np.ndarray:
        """[keys] int64: the value of each key; no two keys share one."""
        values = np.arange(self._keys, self.symbols - 1)
        return np.random.default_rng((self.seed, self.symbols)).permutation(values)[: self._keys]

    def batch(self, number: int, rows: int) -> Batch:
        key = self.generator(number).integers(self._keys, size=(rows, self.length // 2))
        tokens = np.full((rows, self.length), self.symbols - 1)
        tokens[:, ::2] = key
        batch = unasked(tokens)
        asked = np.broadcast_to(np.arange(1, self.length, 2), key.shape)
        ask(batch, asked, self.values()[key], asked - 1)
        return batch
