"""MAD's fuzzy in-context recall: keys and values are runs of several tokens; a key seen before asks for its value.

    - - a b V W c U d a V a b V W ... d a V        answers: V at the second b, W at the V behind it, V at the last a

Runs hold no token twice, and end where the other kind begins: their vocabularies are disjoint. Sizes are uniform from 1
to the longest in training; evaluation (`number` from EVALUATION on) has longest keys only, as in MAD. The last pair
repeats an earlier one. Rows are padded on the left. Only answers are labelled (MAD trains on every next token).
Source: Poli et al. 2024, arXiv 2403.17844, with multiple queries as in its benchmark.

Token ids: those of keys, those of values, padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bmojo.data.synthetic.task import EVALUATION, Batch, Task, previous, unasked


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """Keys of at most `key_tokens`, values of at most `value_tokens`; one of the `symbols` is padding."""

    length: int = 128
    symbols: int = 16
    key_tokens: int = 3
    value_tokens: int = 3

    def check(self) -> None:
        self.require(self.symbols >= 3, f"symbols must be at least 3, got {self.symbols}")
        for name, longest, vocabulary in (
            ("key_tokens", self.key_tokens, self._keys),
            ("value_tokens", self.value_tokens, self._pad - self._keys),
        ):
            most = min(vocabulary, 4)
            self.require(
                1 <= longest <= most, f"{name} must be from 1 to {most} for {self.symbols} symbols, got {longest}"
            )
        least = 2 * self._longest
        self.require(
            self.length >= least,
            f"length must be at least 2 * (key_tokens + value_tokens) ({least}), got {self.length}",
        )

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / (self._pad - self._keys)

    @property
    def _pad(self) -> int:
        return self.symbols - 1

    @property
    def _keys(self) -> int:
        return self._pad // 2

    @property
    def _longest(self) -> int:
        return self.key_tokens + self.value_tokens

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        shortest = self.key_tokens if number >= EVALUATION else 1
        mean = (shortest + self.key_tokens + 1 + self.value_tokens) / 2
        pairs = int(1.25 * self.length / mean) + 1  # what does not fit is cut
        key = _runs(draw, (rows, pairs, self.key_tokens), self._keys)
        value = self._keys + _runs(draw, (rows, pairs, self.value_tokens), self._pad - self._keys)
        key_size = draw.integers(shortest, self.key_tokens + 1, (rows, pairs))
        digit = np.where(np.arange(self.key_tokens) < key_size[:, :, None], key + 1, 0)
        name = digit @ (self._keys + 1) ** np.arange(self.key_tokens)  # tells any two keys apart
        before = previous(name)
        # A key's value is that of its first showing
        origin = np.where(before < 0, np.arange(pairs), before)
        while np.take_along_axis(before, origin, 1).max() >= 0:
            origin = np.take_along_axis(origin, origin, 1)
        value = np.take_along_axis(value, origin[:, :, None], 1)
        value_size = np.take_along_axis(draw.integers(1, self.value_tokens + 1, (rows, pairs)), origin, 1)

        # Pairs are shown until the row has no room for the longest beside the last, which repeats one of them
        shown = (key_size + value_size).cumsum(1) <= self.length - self._longest
        last = (draw.random((rows, 1)) * shown.sum(1, keepdims=True)).astype(np.int64)
        same = np.where(shown & (name == np.take_along_axis(name, last, 1)), np.arange(pairs), -1)
        before = np.concatenate([before, same.max(1, keepdims=True)], 1)

        def with_last(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.take_along_axis(array, last.reshape(rows, *[1] * (array.ndim - 1)), 1)], 1)

        # A row is a run of padding, then runs of keys and values by turns
        runs = np.full((rows, 2 * pairs + 3, max(self.key_tokens, self.value_tokens)), self._pad)
        runs[:, 1::2, : self.key_tokens] = with_last(key)
        runs[:, 2::2, : self.value_tokens] = with_last(value)
        size = np.zeros(runs.shape[:2], np.int64)
        size[:, 1::2] = with_last(key_size * shown)
        size[:, 2::2] = with_last(value_size * shown)
        size[:, 0] = self.length - size.sum(1)
        begin = (size.cumsum(1) - size).ravel()
        source = np.full(size.shape, -1)  # the run that a value repeats
        source[:, 2::2] = np.where(before < 0, -1, np.arange(rows)[:, None] * size.shape[1] + 2 * before + 2)

        run = np.repeat(np.arange(size.size), size.ravel())
        place = np.tile(np.arange(self.length), rows)
        within = np.minimum(place - begin[run], runs.shape[2] - 1)
        tokens = runs.reshape(-1)[run * runs.shape[2] + within]
        batch = unasked(tokens.reshape(rows, self.length))
        repeated = (source.ravel()[run] >= 0).nonzero()[0]
        fact = begin[source.ravel()[run[repeated]]] + within[repeated]
        batch["labels"].reshape(-1)[repeated - 1] = tokens[repeated]
        batch["distance"].reshape(-1)[repeated - 1] = place[repeated] - 1 - fact
        return batch


def _runs(draw: np.random.Generator, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """Runs [..., tokens] of tokens below `vocabulary`, in each all different and every such run as likely."""
    runs = np.empty(shape, np.int64)
    ranked: list[np.ndarray] = []  # the tokens before, in ascending order
    for i in range(shape[-1]):
        token = draw.integers(vocabulary - i, size=shape[:-1])  # its rank among those that the run has not
        for earlier in ranked:
            token += token >= earlier
        runs[..., i] = token
        for j, earlier in enumerate(ranked):
            ranked[j], token = np.minimum(earlier, token), np.maximum(earlier, token)
        ranked.append(token)
    return runs
