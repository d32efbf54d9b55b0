"""What finds blocks by their keys: derived from the log, rebuilt from it at any time.

Keys lie in float16, in parts of ascending ids: flat ones of at most `PART` keys, which are searched exactly (faiss, or
NumPy where it isn't installed), and at most one before them that is inverted (faiss IVF), for stores of many keys.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import numpy as np

from bmojo.errors import MissingPackageError
from bmojo.files import optional_module
from bmojo.memory.engines.engine import Found

PART = 65536
TIES = 4096  # keys of equal score among which the newer are preferred


class Part(ABC):
    """Keys float16 [rows, dim], with the id and the number of the source of each row's block."""

    def __init__(self, rows: int) -> None:
        self.owner, self.source = np.empty(rows, np.int64), np.empty(rows, np.int32)
        self.rows = 0

    def add(self, keys: np.ndarray, owner: np.ndarray, source: np.ndarray) -> None:
        end = self.rows + len(keys)
        self._add(keys)
        self.owner[self.rows : end], self.source[self.rows : end] = owner, source
        self.rows = end

    def drop(self, sources: Collection[int]) -> None:
        keep = ~np.isin(self.source[: self.rows], list(sources))
        if not keep.all():
            self._keep(keep)
            rows = int(keep.sum())
            self.owner[:rows], self.source[:rows] = self.owner[: self.rows][keep], self.source[: self.rows][keep]
            self.rows = rows

    def search(
        self, queries: np.ndarray, count: int, after: int, generation: int
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Scores and ids [queries, at most count] of the best keys of blocks in (after, generation], best first, -inf
        and -1 where there are fewer; and whether there may be more."""
        first, end = np.searchsorted(self.owner[: self.rows], [after, generation], side="right")
        if first >= end:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), False
        score, row = self._search(queries, min(count, int(end - first)), int(first), int(end))
        found = row >= 0
        return np.where(found, score, -np.inf), np.where(found, self.owner[row], -1), count < end - first

    @abstractmethod
    def _add(self, keys: np.ndarray) -> None: ...

    @abstractmethod
    def _keep(self, rows: np.ndarray) -> None: ...

    @abstractmethod
    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]: ...


class NumpyPart(Part):
    def __init__(self, dim: int) -> None:
        super().__init__(PART)
        self._keys = np.empty((PART, dim), np.float16)

    def _add(self, keys: np.ndarray) -> None:
        self._keys[self.rows : self.rows + len(keys)] = keys

    def _keep(self, rows: np.ndarray) -> None:
        self._keys[: rows.sum()] = self._keys[: self.rows][rows]

    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        score = queries @ self._keys[first:end].T.astype(np.float32)
        best = np.argpartition(score, -count, axis=1)[:, -count:]
        value = np.take_along_axis(score, best, axis=1)
        order = np.argsort(-value, axis=1)
        return np.take_along_axis(value, order, axis=1), first + np.take_along_axis(best, order, axis=1)


class FlatPart(Part):
    def __init__(self, dim: int, faiss: Any) -> None:
        super().__init__(PART)
        self._faiss, self._dim = faiss, dim
        self._index = self._new()

    def _new(self) -> Any:
        return self._faiss.IndexScalarQuantizer(
            self._dim, self._faiss.ScalarQuantizer.QT_fp16, self._faiss.METRIC_INNER_PRODUCT
        )

    def _add(self, keys: np.ndarray) -> None:
        self._index.add_sa_codes(np.ascontiguousarray(keys).view(np.uint8))

    def _keep(self, rows: np.ndarray) -> None:
        codes = self._faiss.vector_to_array(self._index.codes).reshape(self.rows, -1)
        self._index = self._new()
        self._index.add_sa_codes(codes[rows])

    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        if (first, end) == (0, self.rows):
            return self._index.search(queries, count)
        some = self._faiss.SearchParameters(sel=self._faiss.IDSelectorRange(first, end))
        return self._index.search(queries, count, params=some)


class Index:
    """Keys of one layer's blocks with ids up to `last`. Not safe from several threads."""

    def __init__(self, dim: int) -> None:
        self.dim, self.last, self._each = dim, -1, 1
        self._parts: list[Part] = []
        try:
            self._faiss = optional_module("faiss", "fast search", "memory")
        except MissingPackageError:
            self._faiss = None
            warnings.warn("faiss isn't installed: search is slower; pip install 'bmojo[memory]'", stacklevel=2)

    @property
    def keys(self) -> int:
        return sum(part.rows for part in self._parts)

    def add(self, keys: np.ndarray, owner: np.ndarray, source: np.ndarray) -> None:
        """Keys float16 [n, dim] of blocks with the ids `owner` int64 [n], ascending and above all before, and of the
        sources with the numbers `source` int32 [n]."""
        if len(owner):
            self._each = max(self._each, int(np.unique(owner, return_counts=True)[1].max()))
            self.last = int(owner[-1])
        while len(owner):
            if not self._parts or self._parts[-1].rows == PART:
                self._parts.append(NumpyPart(self.dim) if self._faiss is None else FlatPart(self.dim, self._faiss))
            room = PART - self._parts[-1].rows
            self._parts[-1].add(keys[:room], owner[:room], source[:room])
            keys, owner, source = keys[room:], owner[room:], source[room:]

    def drop(self, sources: Collection[int]) -> None:
        """Forget the keys of these sources."""
        for part in self._parts:
            part.drop(sources)

    def search(self, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        """As `Engine.search`. Of more than `TIES` keys of a part that have the same score, some are taken."""
        queries = np.ascontiguousarray(queries, np.float32)
        wanted = count * self._each  # so many keys are of `count` blocks at least
        found = [part.search(queries, wanted, after, generation) for part in self._parts]
        found = found or [(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), False)]
        while True:
            best = _fold(np.concatenate([f[0] for f in found], 1), np.concatenate([f[1] for f in found], 1), count)
            # where a part's last key ties with the last block, a newer one may be left out
            open_ = [
                i for i, (score, _, more) in enumerate(found) if more and (score[:, -1] >= best.score[:, -1]).any()
            ]
            if not open_ or wanted >= TIES:
                return best
            wanted *= 4
            for i in open_:
                found[i] = self._parts[i].search(queries, wanted, after, generation)


def _fold(score: np.ndarray, owner: np.ndarray, count: int) -> Found:
    """The best key of each block, of keys [queries, any]."""
    best = Found(np.full((len(score), count), -np.inf, np.float32), np.full((len(score), count), -1, np.int64))
    for row in range(len(score)):
        order = np.lexsort((-owner[row], -score[row]))
        ids = owner[row][order]
        _, first = np.unique(ids, return_index=True)
        first = np.sort(first)[:count]
        first = first[ids[first] >= 0]
        best.score[row, : len(first)], best.id[row, : len(first)] = score[row][order[first]], ids[first]
    return best
