"""MAD's compression: random tokens, and every one of them is to be told from what the last position holds.

    d a a c b ... a !        decode: p0 p1 p2 ...        answers: d a a c b ... a

The answer to position i is asked with the token p_i of that position, beside the features of `!` and nothing else.
Source: Poli et al. 2024, arXiv 2403.17844; there a decoder of its own takes the features and the position.

Token ids: those that are to be told, `!`, then one for each position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """One of the `symbols` is `!`, the last of the `length` tokens."""

    length: int = 32
    symbols: int = 16

    def check(self) -> None:
        self.require(self.length >= 2, f"length must be at least 2, got {self.length}")
        self.require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + self.length - 1

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 1)

    def batch(self, number: int, rows: int) -> Batch:
        """`tokens` [rows, length]; `decode`, `labels` and `distance` [rows, length - 1], one entry a position."""
        tokens = self.generator(number).integers(self.symbols - 1, size=(rows, self.length))
        tokens[:, -1] = self.symbols - 1
        labels = tokens[:, :-1].copy()
        position = np.broadcast_to(np.arange(self.length - 1), labels.shape)
        return {
            "tokens": tokens,
            "decode": self.symbols + position,
            "labels": labels,
            "distance": self.length - 1 - position,
        }
