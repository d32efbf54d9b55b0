"""MAD's in-context recall, plain and noisy: pairs of a small map over and over; a key seen before asks for its value.

    k3 v1 k5 v2 n4 n1 k3 v1 k0 v2 ... k5 v2        answers: v1 at the second k3, v2 at the last k5, ...

Every sequence has a map of its own, in which keys may share a value. Noise takes the place of a pair with probability
`noise`, never of all pairs. The last pair always asks. Only answers are labelled (MAD trains on every next token).
Source: Poli et al. 2024, arXiv 2403.17844, with multiple queries as in its benchmark.

Token ids: keys, then values, then noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, previous, unasked


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
    """`noise_symbols` of the `symbols` are noise; the rest are half keys, half values."""

    length: int = 128
    symbols: int = 16
    noise: float = 0.0
    noise_symbols: int = 0

    def check(self) -> None:
        self.require(self.length % 2 == 0 and self.length >= 4, f"length must be even, 4 or more, got {self.length}")
        self.require(0 <= self.noise < 1, f"noise must be at least 0 and below 1, got {self.noise}")
        least = 1 if self.noise else 0
        self.require(
            self.noise_symbols >= least,
            f"noise_symbols must be at least {least} for noise {self.noise}, got {self.noise_symbols}",
        )
        least = self.noise_symbols + 2
        self.require(self.symbols >= least, f"symbols must be at least noise_symbols + 2 ({least}), got {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / (self._first_noise - self._keys)

    @property
    def _keys(self) -> int:
        return self._first_noise // 2

    @property
    def _first_noise(self) -> int:
        return self.symbols - self.noise_symbols

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        pairs, every = self.length // 2, np.arange(rows)
        table = draw.integers(self._keys, self._first_noise, (rows, self._keys))
        key = draw.integers(self._keys, size=(rows, pairs))
        shown = draw.random((rows, pairs)) >= self.noise
        shown[every, draw.integers(pairs - 1, size=rows)] = True
        shown[:, -1] = False
        met = np.zeros((rows, self._keys), bool)
        met[shown.nonzero()[0], key[shown]] = True
        key[:, -1] = (met * draw.random(met.shape)).argmax(1)  # one of those met, each as likely
        shown[:, -1] = True
        value = np.take_along_axis(table, key, 1)
        tokens = np.stack([key, value], 2)
        if self.noise:
            tokens[~shown] = draw.integers(self._first_noise, self.symbols, (int((~shown).sum()), 2))
        batch = unasked(tokens.reshape(rows, self.length))
        before = previous(np.where(shown, key, self._keys + np.arange(pairs)))
        row, pair = (before >= 0).nonzero()
        batch["labels"][row, 2 * pair] = value[row, pair]
        batch["distance"][row, 2 * pair] = 2 * (pair - before[row, pair]) - 1
        return batch


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall where a fifth of the pairs is noise."""

    symbols: int = 32
    noise: float = 0.2
    noise_symbols: int = 16
