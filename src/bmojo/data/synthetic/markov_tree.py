"""Variable-order Markov sources: bits from a fresh random context tree in every sequence.

    P(x_t = 1 | past) = theta of the leaf whose label ends the past        e.g. leaves 0, 01, 11 (newest bit last)

The tree is grown from the root: a node above `depth` splits with probability `split` into the two contexts that are one
bit longer, theta ~ Beta(1/2, 1/2) at the leaves. With split = 1/2 this is the prior of context-tree weighting
(Willems, Shtarkov and Tjalkens 1995), so CTW of the same depth is the best that any predictor can do that does not
know the trees. Before the first bit stand zeros, which are not shown.

Token ids: the bits, then the start, which stands first; the label of a token is the bit behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, next_symbols


@dataclass(frozen=True, kw_only=True)
class MarkovTree(Task):
    """Sequences of `length` bits; leaves are at most `depth` bits deep: 1 + depth / 2 of them in the mean."""

    length: int = 256
    depth: int = 10
    split: float = 0.5

    def check(self) -> None:
        self.require(0 <= self.depth <= 16, f"depth must be from 0 to 16, got {self.depth}")
        self.require(0 <= self.split <= 1, f"split must be from 0 to 1, got {self.split}")

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 0.5

    def sources(self, number: int, rows: int) -> np.ndarray:
        """[rows, 2^depth] float64: P(1 | the last `depth` bits), the newest of which is the lowest of the index."""
        return self._sources(self.generator(number), rows)

    def bits(self, number: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The bits of batch `number` [rows, length] uint8, and what its sources gave a one each time, float64."""
        draw = self.generator(number)
        ones, row = self._sources(draw, rows), np.arange(rows)
        uniform = draw.random((self.length, rows))
        bits, given = np.empty((rows, self.length), np.uint8), np.empty((rows, self.length))
        context = np.zeros(rows, np.int64)
        for t in range(self.length):
            given[:, t] = ones[row, context]
            bits[:, t] = uniform[t] < given[:, t]
            context = (2 * context + bits[:, t]) % 2**self.depth
        return bits, given

    def batch(self, number: int, rows: int) -> Batch:
        """Every next bit is asked; `distance` is that to the start."""
        return next_symbols(self.bits(number, rows)[0], start=2)

    def _sources(self, draw: np.random.Generator, rows: int) -> np.ndarray:
        inner = np.ones((rows, 1), bool)  # whether all nodes above have split
        ones = _arcsine(draw, (rows, 1))
        for level in range(1, self.depth + 1):
            inner = inner & (draw.random(inner.shape) < self.split)
            inner, ones = np.tile(inner, 2), np.tile(ones, 2)  # the new bit is the oldest, the highest of the index
            ones = np.where(inner, _arcsine(draw, (rows, 2**level)), ones)
        return ones


def _arcsine(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Beta(1/2, 1/2), which is the arcsine law."""
    return np.sin(np.pi / 2 * draw.random(shape)) ** 2
