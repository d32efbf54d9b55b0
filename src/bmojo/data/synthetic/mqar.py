"""Multi-query associative recall: key-value pairs first, then each key again among filler; the answer is its value.

    k1 v1 k2 v2 ... kn vn  . . . k2 . . k7 . . . . . k1 . .        answers: v2 at the second k2, v7, v1, ...

After Arora et al. 2023 (Zoology, arXiv 2312.04927), with the gaps between pairs and queries drawn from their power law
p(gap) ~ gap^(a-1). Filler comes from a vocabulary of its own: random draws from the keys would be as unpredictable as
the pairs, and could be mistaken for queries.

Token ids: keys, then values, then filler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.errors import DataError

NO_ANSWER = -100


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """`pairs` pairs in `length` tokens; `keys` and `values` are the sizes of their vocabularies."""

    length: int
    pairs: int
    keys: int = 128
    values: int = 128
    power: float = 0.01  # a: 1 is uniform, towards 0 the queries come soon after the pairs
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.pairs > self.keys:
            raise DataError(f"pairs must be between 1 and the number of keys ({self.keys}), got {self.pairs}")
        if self.length < 4 * self.pairs:
            raise DataError(f"length must be at least 4 * pairs ({4 * self.pairs}), got {self.length}; use fewer pairs")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + 1

    @property
    def filler(self) -> int:
        """The one filler token."""
        return self.keys + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def batch(self, number: int, rows: int) -> dict[str, np.ndarray]:
        """Batch `number`: int64 `tokens` and `labels` [rows, length]; labels are NO_ANSWER but at the queries."""
        draw = np.random.default_rng((self.seed, self.pairs, self.length, number))
        keys, values = self._pairs(draw, rows)
        places = (self.length - 2 * self.pairs) // 2  # queries stand at even offsets after the pairs
        weight = (self.power - 1) * np.log(np.arange(1, places + 1)) + draw.gumbel(size=(rows, places))
        at = 2 * self.pairs + 2 * np.argsort(-weight, axis=1)[:, : self.pairs]  # drawn without replacement
        return self._place(keys, values, at)

    def at_distance(self, distance: int, rows: int) -> dict[str, np.ndarray]:
        """The same, with every query exactly `distance` tokens after its key."""
        if distance < 2 * self.pairs or distance + 2 * self.pairs > self.length or distance % 2:
            raise DataError(
                f"distance must be even, from {2 * self.pairs} to {self.length - 2 * self.pairs} "
                f"for {self.pairs} pairs in {self.length} tokens, got {distance}"
            )
        draw = np.random.default_rng((self.seed, self.pairs, self.length, distance, 1))
        keys, values = self._pairs(draw, rows)
        return self._place(keys, values, np.broadcast_to(2 * np.arange(self.pairs) + distance, keys.shape))

    def _pairs(self, draw: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        keys = np.argsort(draw.random((rows, self.keys)), axis=1)[:, : self.pairs]
        return keys, draw.integers(self.keys, self.keys + self.values, (rows, self.pairs))

    def _place(self, keys: np.ndarray, values: np.ndarray, at: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.full((len(keys), self.length), self.filler, dtype=np.int64)
        tokens[:, 0 : 2 * self.pairs : 2] = keys
        tokens[:, 1 : 2 * self.pairs : 2] = values
        labels = np.full_like(tokens, NO_ANSWER)
        np.put_along_axis(tokens, at, keys, 1)
        np.put_along_axis(labels, at, values, 1)
        return {"tokens": tokens, "labels": labels}
