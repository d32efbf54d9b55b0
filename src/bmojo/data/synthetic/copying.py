"""MAD's selective copying: tokens with blanks between them, to be told in their order at the end.

    c . . a . . . b ! . . .        answers at the last blanks: c a b

Every blank falls before one of the tokens, each as likely; none falls behind the last.
Source: Poli et al. 2024, arXiv 2403.17844.

Token ids: those to copy, then the blank, then `!`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, ask, unasked


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """`copies` tokens to copy; two of the `symbols` are the blank and `!`."""

    length: int = 256
    symbols: int = 16
    copies: int = 16

    def check(self) -> None:
        self.require(self.symbols >= 3, f"symbols must be at least 3, got {self.symbols}")
        self.require(self.copies >= 1, f"copies must be at least 1, got {self.copies}")
        least = 2 * self.copies + 1
        self.require(self.length >= least, f"length must be at least 2 * copies + 1 ({least}), got {self.length}")

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / (self.symbols - 2)

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        blanks = self.length - 2 * self.copies - 1
        answers = draw.integers(self.symbols - 2, size=(rows, self.copies))
        blanks_before = draw.multinomial(blanks, [1 / self.copies] * self.copies, size=rows).cumsum(1)
        place = blanks_before + np.arange(self.copies)
        tokens = np.full((rows, self.length), self.symbols - 2)
        np.put_along_axis(tokens, place, answers, 1)
        tokens[:, blanks + self.copies] = self.symbols - 1
        batch = unasked(tokens)
        ask(batch, np.broadcast_to(np.arange(self.length - self.copies, self.length), place.shape), answers, place)
        return batch
