"""The interface of a store of blocks, and its definition in memory.

Blocks get ascending ids as they are put. A *generation* is the id of the newest block that a reader sees: what is put
later has a higher one, so a reader that stays at its generation finds the same whatever others write. `pin` tells the
newest generation that is published; an engine publishes what was put within its publish interval (default 1 s).

What is deleted is hidden at once, from every generation; `compact` removes it from the files for good. Ids are never
used again.
"""

from __future__ import annotations

import difflib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from bmojo.errors import StoreError
from bmojo.memory.engines.block import Block, decode, encode, with_id

LARGEST = float(np.finfo(np.float16).max)  # engines may keep keys, and compare queries, in float16


class NoBlocks(StoreError):
    """Blocks that are not there, or not any more."""


class Found(NamedTuple):
    """score float32 [queries, count], descending, -inf where fewer were found; id int64 [queries, count], then -1."""

    score: np.ndarray
    id: np.ndarray


class Engine(ABC):
    """A store of blocks. One process writes to it, any number read. Safe from several threads.

    `meta`: JSON that was given when it was made: what the blocks of this store must fit. Raises StoreError for a store
    that is damaged, of another kind or a newer format, and for a second writer.
    """

    meta: dict[str, Any]

    @abstractmethod
    def put(self, blocks: Sequence[Block]) -> list[int]:
        """Append copies, all or none; the ids given. When it returns, the death of the process loses none of them.
        Raises StoreError for a block that no store can keep, see `check_blocks`."""

    @abstractmethod
    def get(self, ids: Sequence[int]) -> list[Block]:
        """The blocks of these ids, in this order, their checksums tested. Raises StoreError for one that is damaged,
        NoBlocks for one that is not there (any more)."""

    @abstractmethod
    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        """The `count` blocks of `layer` with ids in (after, generation] of highest score for each of `queries` float32
        [n, dim]. The score of a block is the largest inner product of the query with one of its keys, up to the
        rounding of both to float16; ties to the newer. `generation` is one that `pin` told."""

    @abstractmethod
    def delete(self, source: str) -> int:
        """Hide all blocks of a source, and what is known of it; how many blocks. What is put under its name later is
        seen. Raises StoreError for a source that the store doesn't know."""

    @abstractmethod
    def pin(self) -> int:
        """The newest generation published; -1: nothing is stored."""

    @abstractmethod
    def compact(self) -> None:
        """Rewrite the files without what was deleted."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """engine, blocks, tokens, deleted (blocks hidden, not yet removed), sources, bytes (on disk), generation."""

    # what was read into the store, for those who fill it from files
    @abstractmethod
    def sources(self) -> dict[str, dict[str, Any]]:
        """Every source that is not deleted: {"blocks": n, "tokens": n, ...} and what `note` was told of it."""

    @abstractmethod
    def note(self, source: str, **facts: Any) -> None:
        """Keep facts (JSON) of a source, such as the hash of the file that it was read from; later ones replace."""

    @abstractmethod
    def scan(self) -> Iterator[Block]:
        """All blocks that are not deleted, oldest first."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is pending, and let go of the files."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_blocks(blocks: Sequence[Block], dim: int | None) -> int | None:
    """The dimension of the keys of a store that had keys of `dim` (None: none yet) once `blocks` are put.

    Raises StoreError for a block that no store can keep: arrays that do not fit each other or the store, keys that are
    not finite in float16, a layer that is no number from 0 up, a source that is no text in UTF-8 without NULs.
    """
    for block in blocks:
        check_layer(block.layer)
        check_source(block.source)
        n, keys, what = len(block.tokens), block.keys, f"a block of {block.source!r}"
        if not n or block.k.ndim != 3 or block.k.shape != block.v.shape or {len(block.k), len(block.score)} != {n}:
            shapes = {name: getattr(block, name).shape for name in ("tokens", "k", "v", "score")}
            raise StoreError(f"{what} needs tokens [n], k and v [n, kv_heads, head_dim] and score [n], got {shapes}")
        if keys.ndim != 2 or not keys.size:
            raise StoreError(f"{what} needs keys [r, dim], at least one; got the shape {keys.shape}")
        if block.k.dtype not in (np.float16, np.float32) or {block.v.dtype, keys.dtype} != {block.k.dtype}:
            got = ", ".join(str(array.dtype) for array in (block.k, block.v, keys))
            raise StoreError(f"{what} needs k, v and keys all in float16 or all in float32, got {got}")
        if not np.abs(keys).max() <= LARGEST:
            raise StoreError(f"{what} has a key that is not finite in float16; its weights or its text are off")
        dim = keys.shape[1] if dim is None else dim
        if keys.shape[1] != dim:
            raise StoreError(f"{what} has keys of dimension {keys.shape[1]}, this store has {dim}: use another store")
    return dim


def check_search(layer: int, queries: np.ndarray, count: int, dim: int | None) -> None:
    """Raises StoreError unless `queries` can be asked of a store with keys of `dim`."""
    check_layer(layer)
    if queries.ndim != 2 or (dim is not None and queries.shape[1] != dim):
        raise StoreError(
            f"queries have the shape {queries.shape}, this store needs [n, {'dim' if dim is None else dim}]"
        )
    if count < 1:
        raise StoreError(f"a search needs a count from 1 up, got {count}")
    if queries.size and not np.abs(queries).max() <= LARGEST:
        raise StoreError("a query is not finite in float16; the weights or the text are off")


def check_layer(layer: int) -> None:
    if type(layer) is not int or layer < 0:
        raise StoreError(f"a layer is a number from 0 up, got {layer!r}")


def check_source(source: str) -> None:
    if not isinstance(source, str) or not source or "\0" in source or not _is_unicode(source):
        raise StoreError(f"a source is named by text in UTF-8 without NULs, got {source!r}: rename it")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_meta(stored: dict[str, Any], given: dict[str, Any] | None, where: str) -> None:
    """Raises StoreError that tells what differs, unless `given` (None: anything) is what the store was made with."""
    if given is None or stored == (given := json.loads(json.dumps(given))):  # in JSON, tuples are lists
        return
    stored, given = dict(_settings(stored)), dict(_settings(given))
    names = sorted(name for name in stored.keys() | given.keys() if stored.get(name) != given.get(name))
    told = "; ".join(f"{name}: the store has {stored.get(name)!r}, asked for {given.get(name)!r}" for name in names)
    raise StoreError(f"{where} is the store of another model or configuration: {told}; use another store")


def _settings(meta: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Its values that are no dictionaries, by name: {"config": {"window": 64}} gives "config.window"."""
    for name, value in meta.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def no_source(source: str, known: Iterable[str]) -> StoreError:
    close = difflib.get_close_matches(source, known, n=1)
    return StoreError(f"the store has no source {source!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def no_blocks(missing: Iterable[int]) -> NoBlocks:
    return NoBlocks(f"the store has no blocks {sorted(set(missing))} (any more): deleted, or of another store")


def best_blocks(score: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Indices of the best keys of the `count` blocks with the best ones, in order; of scores [m] and blocks [m]."""
    order = np.lexsort((-owner, -score))
    _, first = np.unique(owner[order], return_index=True)
    return order[np.sort(first)[:count]]


def rank_blocks(keys: np.ndarray, owner: np.ndarray, queries: np.ndarray, count: int) -> Found:
    """The definition of `Engine.search`: exact, over keys [m, dim] of the blocks `owner` int64 [m]."""
    scores = queries.astype(np.float32) @ keys.astype(np.float32).T
    result = Found(
        np.full((len(queries), count), -np.inf, np.float32), np.full((len(queries), count), -1, dtype=np.int64)
    )
    for row, score in enumerate(scores):
        best = best_blocks(score, owner, count)
        result.score[row, : len(best)], result.id[row, : len(best)] = score[best], owner[best]
    return result


def recall(engine: Engine, layer: int, queries: np.ndarray, count: int, *, generation: int) -> float:
    """The share of the `count` best blocks for each of `queries` [n, dim] that a search finds: 1 for an exact one.

    The best are those of `rank_blocks`, of all blocks up to `generation`, which are read for it.
    """
    best = [Found(np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64))]
    blocks = (b for b in engine.scan() if b.layer == layer and b.id <= generation)
    while some := list(itertools.islice(blocks, 1000)):
        owner = np.repeat(np.array([b.id for b in some], np.int64), [len(b.keys) for b in some])
        best.append(rank_blocks(np.concatenate([b.keys for b in some]), owner, queries, count))
    score, number = (np.concatenate(parts, axis=1) for parts in zip(*best, strict=True))
    found = engine.search(layer, queries, count, generation=generation).id
    hits = wanted = 0
    for row in range(len(queries)):
        exact = number[row][np.lexsort((-number[row], -score[row]))][:count]
        exact = exact[exact >= 0]
        hits, wanted = hits + int(np.isin(exact, found[row]).sum()), wanted + len(exact)
    return hits / wanted if wanted else 1.0


class MemoryEngine(Engine):
    """All of it in the memory of this process; published at once. The definition of what engines do."""

    def __init__(self, meta: dict[str, Any] | None = None) -> None:
        self.meta = {} if meta is None else meta
        self._blocks: dict[int, Block] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._next = 0
        self._dim: int | None = None
        self._lock = RLock()

    def put(self, blocks: Sequence[Block]) -> list[int]:
        with self._lock:
            self._dim = check_blocks(blocks, self._dim)
            ids = list(range(self._next, self._next + len(blocks)))
            # copies that nobody can write to
            self._blocks |= {i: decode(encode(with_id(block, i))) for i, block in zip(ids, blocks, strict=True)}
            self._next += len(blocks)
        return ids

    def get(self, ids: Sequence[int]) -> list[Block]:
        with self._lock:
            if missing := set(ids) - self._blocks.keys():
                raise no_blocks(missing)
            return [self._blocks[number] for number in ids]

    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        check_search(layer, queries, count, self._dim)
        mine = [b for b in self.scan() if b.layer == layer and after < b.id <= generation]
        keys = np.concatenate([b.keys for b in mine]) if mine else np.zeros((0, queries.shape[1]), np.float32)
        owner = np.repeat(np.array([b.id for b in mine], np.int64), [len(b.keys) for b in mine])
        return rank_blocks(keys, owner, queries, count)

    def delete(self, source: str) -> int:
        with self._lock:
            if source not in (known := self.sources()):
                raise no_source(source, known)
            mine = [number for number, block in self._blocks.items() if block.source == source]
            for number in mine:
                del self._blocks[number]
            self._notes.pop(source, None)
        return len(mine)

    def pin(self) -> int:
        return self._next - 1

    def compact(self) -> None: ...

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {
                "engine": "memory",
                "blocks": len(self._blocks),
                "tokens": sum(len(block.tokens) for block in self._blocks.values()),
                "deleted": 0,
                "sources": len(self.sources()),
                "bytes": 0,
                "generation": self.pin(),
            }

    def sources(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            found: dict[str, dict[str, Any]] = {
                name: {"blocks": 0, "tokens": 0, **facts} for name, facts in self._notes.items()
            }
            for block in self._blocks.values():
                entry = found.setdefault(block.source, {"blocks": 0, "tokens": 0})
                entry["blocks"] += 1
                entry["tokens"] += len(block.tokens)
        return found

    def note(self, source: str, **facts: Any) -> None:
        check_source(source)
        with self._lock:
            self._notes.setdefault(source, {}).update(facts)

    def scan(self) -> Iterator[Block]:
        with self._lock:
            blocks = list(self._blocks.values())
        return iter(blocks)

    def close(self) -> None: ...
