"""Induction heads: a special token, met once early on, is met again at the end; the answer is what came behind it.

    c a ! b d a c ... a d !        answer at the last !: b

After Gu and Dao 2023 (Mamba, arXiv 2312.00752) and Fu et al. 2022 (H3, arXiv 2212.14052). Linear in `length`, which may
be anything from 4 to many times that of training.

Token ids: the ordinary ones, then the special one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, ask, unasked


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """One of the `symbols` is special; it stands in the first half, everywhere as likely, and at the end."""

    length: int = 256
    symbols: int = 16

    def check(self) -> None:
        self.require(self.length >= 4, f"length must be at least 4, got {self.length}")
        self.require(self.symbols >= 2, f"symbols must be at least 2, got {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 1)

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        tokens = draw.integers(self.symbols - 1, size=(rows, self.length))
        place = draw.integers(self.length // 2 - 1, size=(rows, 1))
        np.put_along_axis(tokens, place, self.symbols - 1, 1)
        tokens[:, -1] = self.symbols - 1
        batch = unasked(tokens)
        ask(batch, np.full_like(place, self.length - 1), np.take_along_axis(tokens, place + 1, 1), place + 1)
        return batch
