"""Multi-query associative recall: key-value pairs first, then each key again among filler; the answer is its value.

    k1 v1 k2 v2 ... kn vn  . . . k2 . . k7 . . . . . k1 . .        answers: v2 at the second k2, v7, v1, ...

After Arora et al. 2023 (Zoology, arXiv 2312.04927), with the places of the questions drawn from their power law
p(place) ~ place^(a-1), counted in twos from the first place allowed. Filler comes from a vocabulary of its own: random
draws from the keys would be as unpredictable as the pairs, and could be mistaken for queries.

Token ids: keys, then values, then filler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import EVALUATION, NO_ANSWER, Batch, Task, ask, distinct, excerpts, unasked
from bmojo.errors import DataError, nearest

__all__ = ["MQAR", "NO_ANSWER", "ZOOLOGY"]

# Zoology's settings: a vocabulary of 8192 with the filler
ZOOLOGY = tuple(
    {"length": length, "pairs": pairs, "keys": 4095, "values": 4096, "power": 0.01}
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
)
_FILLERS = {"constant": 1, "alphabet": 16, "text": 256}  # sizes of their vocabularies; that of noise is the keys'


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """`pairs` pairs in `length` tokens; `keys` and `values` are the sizes of their vocabularies.

    gap: every question is more than `gap` tokens behind the end of the pairs: with window + fading span as the gap, no
    fact is within reach of either.
    filler: `constant`, `alphabet` (16 symbols, uniform), `text` (bytes of real text) or `noise` (uniform over as many
    ids as there are keys).
    spread: the pairs stand at random even places of the first half (of what the gap leaves) instead of back to back.
    """

    pairs: int
    keys: int = 128
    values: int = 128
    power: float = 0.01  # a: 1 is uniform, towards 0 the queries come soon after the pairs
    gap: int = 0
    filler: str = "constant"
    spread: bool = False

    def check(self) -> None:
        self.require(
            1 <= self.pairs <= self.keys,
            f"pairs must be between 1 and the number of keys ({self.keys}), got {self.pairs}",
        )
        self.require(self.values >= 1, f"values must be at least 1, got {self.values}")
        self.require(0 < self.power < math.inf, f"power must be above 0 and finite, got {self.power}")
        self.require(self.gap >= 0, f"gap must not be negative, got {self.gap}")
        if self.filler not in (*_FILLERS, "noise"):
            raise DataError(f"unknown filler {self.filler!r}; {nearest(self.filler, (*_FILLERS, 'noise'))}")
        needed = 4 * self.pairs + self._gap
        self.require(
            self.length >= needed,
            f"length must be at least 4 * pairs + gap ({needed}), got {self.length}; use fewer pairs",
        )

    @property
    def vocab_size(self) -> int:
        return self.first_filler + _FILLERS.get(self.filler, self.keys)

    @property
    def first_filler(self) -> int:
        """The first id of the filler; the only one if it is constant."""
        return self.keys + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        # Without replacement: each place waits for a time of mean place^(1-a), and the first ones to come are taken
        weight = np.arange(1, self._places + 1) ** (1 - self.power)
        order = np.argsort(draw.standard_exponential((rows, self._places)) * weight, axis=1)
        return self._asked(draw, self._key_places(draw, rows), self._first + 2 * order[:, : self.pairs])

    def at_distance(self, distance: int, rows: int) -> Batch:
        """A batch for evaluation, with every question exactly `distance` tokens after its key, whatever the gap."""
        if distance < self._end or distance + self._end > self.length or distance % 2:
            raise DataError(
                f"distance must be even, from {self._end} to {self.length - self._end} "
                f"for {self.pairs} pairs in {self.length} tokens, got {distance}"
            )
        draw = self.generator(2 * EVALUATION + distance)  # no batch of `batch` has this number
        places = self._key_places(draw, rows)
        return self._asked(draw, places, places + distance)

    def facts(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens belong to the pairs, bool like `tokens` [rows, length]: what an oracle would keep."""
        return (tokens < self.first_filler) & (np.arange(tokens.shape[1]) < self._end)

    @property
    def _end(self) -> int:
        """The first place behind the part where pairs stand."""
        return (self.length - self._gap) // 4 * 2 if self.spread else 2 * self.pairs

    @property
    def _gap(self) -> int:
        """The gap in whole pairs of places: keys and questions stand at even places."""
        return (self.gap + 1) // 2 * 2

    @property
    def _first(self) -> int:
        """The first place where a question may stand."""
        return self._end + self._gap

    @property
    def _places(self) -> int:
        return (self.length - self._first) // 2

    def _key_places(self, draw: np.random.Generator, rows: int) -> np.ndarray:
        if self.spread:
            return 2 * distinct(draw, rows, self.pairs, self._end // 2)
        return np.tile(2 * np.arange(self.pairs), (rows, 1))

    def _asked(self, draw: np.random.Generator, places: np.ndarray, questions: np.ndarray) -> Batch:
        """Keys and values with keys at `places`, filler, and the questions at `questions`, both [rows, pairs]."""
        keys = distinct(draw, len(places), self.pairs, self.keys)
        values = draw.integers(self.keys, self.keys + self.values, keys.shape)
        tokens = self._filling(draw, len(places))
        for where, what in ((places, keys), (places + 1, values), (questions, keys)):
            np.put_along_axis(tokens, where, what, 1)
        batch = unasked(tokens)
        ask(batch, questions, values, places + 1)
        return batch

    def _filling(self, draw: np.random.Generator, rows: int) -> np.ndarray:
        if self.filler == "text":
            return self.first_filler + excerpts(draw, rows, self.length)
        return draw.integers(self.first_filler, self.vocab_size, (rows, self.length))
