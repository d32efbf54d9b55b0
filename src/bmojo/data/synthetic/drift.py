"""A drifting source: a map from keys to values that changes at unknown times; a question asks for the current value.

    k3 v1 k5 v2 k3 . k3 v7 k5 . k3 .        answers: v1 at the second k3, v2 at the second k5, v7 at the last k3

Every two tokens show a pair or ask for one that was shown, with probability `asked`. Each showing after a key's first
brings, with the probability `hazard`, another value than the last: from then on that is the right one, and the old one
is the stale answer of a memory that does not forget.

Token ids: keys, then values, then the blank behind a question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import NO_ANSWER, Batch, Task, unasked


@dataclass(frozen=True, kw_only=True)
class Drift(Task):
    """A map of `keys` keys to `values` values."""

    length: int = 256
    keys: int = 16
    values: int = 64
    hazard: float = 0.2
    asked: float = 0.5

    def check(self) -> None:
        self.require(self.length % 2 == 0 and self.length >= 4, f"length must be even, 4 or more, got {self.length}")
        self.require(self.keys >= 1, f"keys must be at least 1, got {self.keys}")
        self.require(self.values >= 2, f"values must be at least 2, got {self.values}")
        for name in ("hazard", "asked"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} must be from 0 to 1, got {value}")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + 1

    @property
    def chance(self) -> float:
        return 1 / self.values

    def batch(self, number: int, rows: int) -> Batch:
        """With `stale` [rows, length]: at a question the value before the current one, NO_ANSWER if there was none."""
        draw = self.generator(number)
        steps = self.length // 2
        place = np.arange(steps)
        # By key and then by time, where the history of a key is one run
        key, step = np.divmod(np.sort(draw.integers(self.keys, size=(rows, steps)) * steps + place, axis=1), steps)
        first = np.diff(key, axis=1, prepend=-1) != 0
        asked = ~first & (draw.random(key.shape) < self.asked)
        change = ~first & ~asked & (draw.random(key.shape) < self.hazard)
        by = draw.integers(1, self.values, key.shape)  # any change but none, modulo the number of values
        start = np.take_along_axis(draw.integers(self.values, size=(rows, self.keys)), key, 1)
        moved = np.cumsum(change * by, axis=1)
        begun = np.maximum.accumulate(np.where(first, place, 0), axis=1)
        latest = np.maximum.accumulate(np.where(first | change, place, 0), axis=1)
        shown = np.maximum.accumulate(np.where(asked, 0, place), axis=1)

        def at(array: np.ndarray, where: np.ndarray) -> np.ndarray:
            return np.take_along_axis(array, where, 1)

        def value(moved: np.ndarray) -> np.ndarray:
            return self.keys + (start + moved) % self.values

        moved -= at(moved, begun)
        current, old = value(moved), value(moved - at(by, latest))
        tokens = np.empty((rows, self.length), np.int64)
        np.put_along_axis(tokens, 2 * step, key, 1)
        np.put_along_axis(tokens, 2 * step + 1, np.where(asked, self.vocab_size - 1, current), 1)
        batch = unasked(tokens)
        stale = np.full_like(tokens, NO_ANSWER)
        for array, entries in (
            (batch["labels"], np.where(asked, current, NO_ANSWER)),
            (batch["distance"], np.where(asked, 2 * (step - at(step, shown)) - 1, 0)),
            (stale, np.where(asked & (latest > begun), old, NO_ANSWER)),
        ):
            np.put_along_axis(array, 2 * step, entries, 1)
        return {**batch, "stale": stale}
