"""What finds blocks by their keys: derived from the log, rebuilt from it at any time.

Keys lie in float16, in parts of ascending ids: flat ones of at most `PART` keys, which are searched exactly (faiss, or
NumPy where it isn't installed). Of more than `MANY` keys all but the last few go into an inverted part (faiss IVF),
which is kept in a file, for to train it takes seconds. That is done when a store is opened, not later: so what a search
at a pinned generation finds stays the same as long as the store is open.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import extend

from bmojo.errors import MissingPackageError, StoreError
from bmojo.files import optional_module
from bmojo.memory.engines.engine import Found, best_blocks

PART = 65536
MANY = 4 * PART  # keys; a query of that many that are flat takes 2 to 9 ms, of inverted ones 0.1 to 0.4 ms
PROBES = 32  # lists that a query looks into, of sqrt(keys)
SAMPLES = 64  # keys a list that it is trained with
OUTGROWN = 4  # times the keys that it was trained for, it is trained again
TIES = 4096  # keys of equal score among which the newer are preferred


class Part(ABC):
    """Keys float16 [rows, dim], with the id and the number of the source of each row's block."""

    def __init__(self, rows: int) -> None:
        self.owner, self.source = np.empty(rows, np.int64), np.empty(rows, np.int32)
        self.rows = 0

    def add(self, keys: np.ndarray, owner: np.ndarray, source: np.ndarray) -> None:
        end = self.rows + len(keys)
        self._add(keys)
        if end > len(self.owner):
            self.owner = np.concatenate([self.owner, np.empty(end - len(self.owner), np.int64)])
            self.source = np.concatenate([self.source, np.empty(end - len(self.source), np.int32)])
        self.owner[self.rows : end], self.source[self.rows : end] = owner, source
        self.rows = end

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
    def drop(self, sources: Collection[int]) -> None:
        """Forget the keys of these sources."""

    @abstractmethod
    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]: ...


class FlatPart(Part):
    def drop(self, sources: Collection[int]) -> None:
        keep = ~np.isin(self.source[: self.rows], list(sources))
        if not keep.all():
            self._keep(keep)
            rows = int(keep.sum())
            self.owner[:rows], self.source[:rows] = self.owner[: self.rows][keep], self.source[: self.rows][keep]
            self.rows = rows

    @abstractmethod
    def _keep(self, rows: np.ndarray) -> None: ...

    @property
    @abstractmethod
    def keys(self) -> np.ndarray: ...


class NumpyPart(FlatPart):
    def __init__(self, dim: int) -> None:
        super().__init__(PART)
        self._keys = np.empty((PART, dim), np.float16)

    def _add(self, keys: np.ndarray) -> None:
        self._keys[self.rows : self.rows + len(keys)] = keys

    def _keep(self, rows: np.ndarray) -> None:
        self._keys[: rows.sum()] = self.keys[rows]

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: self.rows]

    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        score = queries @ self._keys[first:end].T.astype(np.float32)
        best = np.argpartition(score, -count, axis=1)[:, -count:]
        value = np.take_along_axis(score, best, axis=1)
        order = np.argsort(-value, axis=1)
        return np.take_along_axis(value, order, axis=1), first + np.take_along_axis(best, order, axis=1)


class FaissPart(FlatPart):
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
        keys = self.keys[rows]
        self._index = self._new()
        self._add(keys)

    @property
    def keys(self) -> np.ndarray:
        return self._faiss.vector_to_array(self._index.codes).view(np.float16).reshape(self.rows, self._dim)

    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        if (first, end) == (0, self.rows):
            return self._index.search(queries, count)
        some = self._faiss.SearchParameters(sel=self._faiss.IDSelectorRange(first, end))
        return self._index.search(queries, count, params=some)


class InvertedPart(Part):
    """`index`: trained; its ids are rows. Rows that were dropped keep their places."""

    def __init__(self, faiss: Any, index: Any, trained: int) -> None:
        super().__init__(0)
        self._faiss, self._index, self.trained = faiss, index, trained
        index.nprobe = PROBES

    @classmethod
    def train(cls, faiss: Any, sample: np.ndarray, keys: int) -> InvertedPart:
        """Lists for so many keys, by a sample of them."""
        dim, lists = sample.shape[1], round(keys**0.5)
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dim), dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        index.cp.niter, index.cp.min_points_per_centroid = 10, 1
        index.train(sample.astype(np.float32))
        return cls(faiss, index, keys)

    def _add(self, keys: np.ndarray) -> None:
        self._index.add_with_ids(keys.astype(np.float32), np.arange(self.rows, self.rows + len(keys)))

    def drop(self, sources: Collection[int]) -> None:
        rows = np.flatnonzero(np.isin(self.source[: self.rows], list(sources)))
        if len(rows):
            self._index.remove_ids(self._faiss.IDSelectorBatch(rows))
            self.source[rows] = -1

    def _search(self, queries: np.ndarray, count: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        if (first, end) == (0, self.rows):
            return self._index.search(queries, count)
        some = self._faiss.SearchParametersIVF(sel=self._faiss.IDSelectorRange(first, end), nprobe=PROBES)
        return self._index.search(queries, count, params=some)

    def save(self, path: Path) -> None:
        """To `path` and, checked by it, path.npz: both or none, but for a death of the process between them."""
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            self._faiss.write_index(self._index, str(temporary))
            with open(temporary.with_suffix(".npz"), "wb") as file:
                np.savez(
                    file,
                    owner=self.owner[: self.rows],
                    source=self.source[: self.rows],
                    trained=np.array(self.trained),
                    checksum=np.array(_checksum(temporary)),
                )
            os.replace(temporary, path)
            os.replace(temporary.with_suffix(".npz"), path.with_suffix(".npz"))
        finally:
            temporary.unlink(missing_ok=True)
            temporary.with_suffix(".npz").unlink(missing_ok=True)

    @classmethod
    def load(cls, faiss: Any, path: Path) -> InvertedPart:
        """Raises ValueError for files that are damaged or do not belong together."""
        try:
            with np.load(path.with_suffix(".npz")) as facts:
                if _checksum(path) != facts["checksum"]:
                    raise ValueError("its checksum does not fit")
                part = cls(faiss, faiss.read_index(str(path)), int(facts["trained"]))
                part.owner, part.source = facts["owner"], facts["source"]
                part.rows = len(part.owner)
        except (OSError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
            raise ValueError(str(error)) from error
        return part


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(1 << 20):
            checksum = extend(checksum, content)
    return checksum


class Index:
    """Keys of one layer's blocks with ids up to `last`. Not safe from several threads."""

    def __init__(self, dim: int) -> None:
        self.dim, self.last, self._each = dim, -1, 1
        self.unsaved = False  # there is more in the inverted part than in its file
        self._parts: list[Part] = []
        try:
            self._faiss = optional_module("faiss", "fast search", "memory")
        except MissingPackageError:
            self._faiss = None
            warnings.warn("faiss isn't installed: search is slower; pip install 'bmojo[memory]'", stacklevel=2)

    @property
    def keys(self) -> int:
        return sum(part.rows for part in self._parts)

    @property
    def sources(self) -> set[int]:
        return {int(number) for part in self._parts for number in np.unique(part.source[: part.rows])} - {-1}

    def add(self, keys: np.ndarray, owner: np.ndarray, source: np.ndarray) -> None:
        """Keys float16 [n, dim] of blocks with the ids `owner` int64 [n], ascending and above all before, and of the
        sources with the numbers `source` int32 [n]."""
        if len(owner):
            self._each = max(self._each, int(np.unique(owner, return_counts=True)[1].max()))
            self.last = int(owner[-1])
        while len(owner):
            if not self._parts or not isinstance(self._parts[-1], FlatPart) or self._parts[-1].rows == PART:
                self._parts.append(NumpyPart(self.dim) if self._faiss is None else FaissPart(self.dim, self._faiss))
            room = PART - self._parts[-1].rows
            self._parts[-1].add(keys[:room], owner[:room], source[:room])
            keys, owner, source = keys[room:], owner[room:], source[room:]

    def load(self, path: Path, newest: int) -> None:
        """Begin with what was saved there, if it is whole and of blocks up to `newest`; warns if it isn't."""
        if self._faiss is None or not path.exists():
            return
        try:
            part = InvertedPart.load(self._faiss, path)
            if part.owner[-1] > newest:
                raise ValueError("it is of another log")
        except ValueError as error:
            warnings.warn(f"{path} is damaged ({error}): it is made again", stacklevel=2)
            return
        self._parts, self.last = [part], int(part.owner[-1])
        self._each = int(np.unique(part.owner, return_counts=True)[1].max())

    @property
    def _inverted(self) -> InvertedPart | None:
        return self._parts[0] if self._parts and isinstance(self._parts[0], InvertedPart) else None

    @property
    def outgrown(self) -> bool:
        """There are so many keys that they should be in an inverted part, or in one with more lists."""
        inverted = self._inverted
        return self._faiss is not None and self.keys > (OUTGROWN * inverted.trained if inverted else MANY)

    def train(self, keys: Iterable[np.ndarray]) -> None:
        """Begin with an inverted part for all of these [any, dim], with none of them in it yet."""
        rng, share, count = np.random.default_rng(0), 1.0, 0
        sample: list[np.ndarray] = []
        for some in keys:
            sample.append(some[rng.random(len(some)) < share])
            count += len(some)
            if sum(map(len, sample)) > 2 * SAMPLES * count**0.5:
                sample, share = [part[rng.random(len(part)) < 0.5] for part in sample], share / 2
        self._parts = [InvertedPart.train(self._faiss, np.concatenate(sample), count)]

    def settle(self, *, last: bool = False) -> None:
        """Put the keys of all flat parts but the last into the inverted one, if there is one; of the last if told so,
        and if they are many."""
        inverted = self._inverted
        while inverted is not None and (
            len(self._parts) > 2 or (last and len(self._parts) == 2 and self._parts[1].rows > PART // 4)
        ):
            part = self._parts.pop(1)
            assert isinstance(part, FlatPart)
            inverted.add(part.keys, part.owner[: part.rows], part.source[: part.rows])
            self.unsaved = True

    def save(self, path: Path) -> None:
        """The inverted part, which is then as `load` gives it. Warns if it can't be kept. Raises StoreError if another
        process has changed what was saved."""
        if (inverted := self._inverted) is None:
            return
        try:
            inverted.save(path)
            del inverted, self._parts[0]  # lists that grew take more memory than those that are read
            self._parts.insert(0, InvertedPart.load(self._faiss, path))
        except (OSError, RuntimeError) as error:
            warnings.warn(f"{path} can't be kept ({error}): it is made again at the next opening", stacklevel=2)
        except ValueError as error:
            raise StoreError(f"{path} was changed while it was made ({error}): search again") from error
        self.unsaved = False

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
        order = best_blocks(score[row], owner[row], count)
        order = order[owner[row][order] >= 0]
        best.score[row, : len(order)], best.id[row, : len(order)] = score[row][order], owner[row][order]
    return best
