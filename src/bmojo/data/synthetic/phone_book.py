"""Phone-book look-up: names with numbers, then some of the names again; the answers are their numbers, digit by digit.

    . Ann Lee 5 5 1 Bob Lee 2 0 7 Ann Roy 9 1 1 ? Bob Lee 2 0 7 Ann Lee 5 5 1
                       answers: 2 at the second Bob Lee, 0 and 7 behind it, then 5, 5, 1

Neither a first nor a last name is enough: both recur in other names. After Jelassi et al. 2024 (arXiv 2402.01032), with
a token for each name and digit. The book fills the sequence; what is left over is padding in front.

Token ids: first names, last names, ten digits, `?`, padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, ask, distinct, unasked


@dataclass(frozen=True, kw_only=True)
class PhoneBook(Task):
    """`lookups` names are asked; there are `first_names` * `last_names` names, and numbers have `digits` digits."""

    length: int = 512
    lookups: int = 4
    digits: int = 4
    first_names: int = 64
    last_names: int = 64

    def check(self) -> None:
        for name in ("lookups", "digits", "first_names", "last_names"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        least = 2 * self.lookups * self._entry + 1
        self.require(
            self.length >= least,
            f"length must be at least 2 * lookups * (digits + 2) + 1 ({least}), got {self.length}; ask fewer lookups",
        )
        names = self.first_names * self.last_names
        self.require(
            self.entries <= names,
            f"first_names * last_names must be at least the {self.entries} entries that fit, got {names}",
        )

    @property
    def vocab_size(self) -> int:
        return self._first_digit + 12

    @property
    def chance(self) -> float:
        return 1 / 10

    @property
    def entries(self) -> int:
        """How many names the book holds."""
        return (self.length - 1) // self._entry - self.lookups

    @property
    def _entry(self) -> int:
        return self.digits + 2

    @property
    def _first_digit(self) -> int:
        return self.first_names + self.last_names

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        first, last = np.divmod(distinct(draw, rows, self.entries, self.first_names * self.last_names), self.last_names)
        names = np.stack([first, self.first_names + last], 2)
        digits = draw.integers(self._first_digit, self._first_digit + 10, (rows, self.entries, self.digits))
        book = np.concatenate([names, digits], 2)
        asked = distinct(draw, rows, self.lookups, self.entries)
        lookups = np.take_along_axis(book, asked[:, :, None], 1)
        tokens = np.full((rows, self.length), self.vocab_size - 1)
        question = self.length - self.lookups * self._entry
        start = question - 1 - self.entries * self._entry
        tokens[:, start : question - 1] = book.reshape(rows, -1)
        tokens[:, question - 1] = self.vocab_size - 2
        tokens[:, question:] = lookups.reshape(rows, -1)
        batch = unasked(tokens)
        digit = np.arange(2, self._entry)
        at = question - 1 + self._entry * np.arange(self.lookups)[:, None] + digit
        facts = start + self._entry * asked[:, :, None] + digit
        ask(
            batch,
            np.broadcast_to(at.ravel(), (rows, at.size)),
            lookups[:, :, 2:].reshape(rows, -1),
            facts.reshape(rows, -1),
        )
        return batch
