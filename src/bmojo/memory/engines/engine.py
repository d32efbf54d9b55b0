"""The interface of a store of blocks, and its definition in memory.

Blocks get ascending ids as they are put. A *generation* is the id of the newest block that a reader sees: what is put
later has a higher one, so a reader that stays at its generation finds the same whatever others write. `pin` tells the
newest generation that is published; an engine publishes what was put within its publish interval (default 1 s).

What is deleted is hidden at once, from every generation; `compact` removes it from the files for good. Ids are never
used again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bmojo.memory.engines.block import Block, with_id


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
        """Append; the ids given. When it returns, the death of the process loses none of them."""

    @abstractmethod
    def get(self, ids: Sequence[int]) -> list[Block]:
        """The blocks of these ids, in this order, their checksums tested. Raises StoreError for one that is damaged,
        or is not there (any more)."""

    @abstractmethod
    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        """The `count` blocks of `layer` with ids in (after, generation] of highest score for each of `queries` float32
        [n, dim]. The score of a block is the largest inner product of the query with one of its keys; ties to the
        newer."""

    @abstractmethod
    def delete(self, source: str) -> int:
        """Hide all blocks of a source, and what is known of it; how many blocks."""

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


def rank_blocks(keys: np.ndarray, owner: np.ndarray, queries: np.ndarray, count: int) -> Found:
    """The definition of `Engine.search`: exact, over keys [m, dim] of the blocks `owner` int64 [m]."""
    scores = queries.astype(np.float32) @ keys.astype(np.float32).T
    result = Found(
        np.full((len(queries), count), -np.inf, np.float32), np.full((len(queries), count), -1, dtype=np.int64)
    )
    for row, score in enumerate(scores):
        order = np.lexsort((-owner, -score))
        _, first = np.unique(owner[order], return_index=True)
        best = order[np.sort(first)[:count]]
        result.score[row, : len(best)], result.id[row, : len(best)] = score[best], owner[best]
    return result


class MemoryEngine(Engine):
    """All of it in the memory of this process; published at once. The definition of what engines do."""

    def __init__(self, meta: dict[str, Any] | None = None) -> None:
        self.meta = {} if meta is None else meta
        self._blocks: dict[int, Block] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._next = 0

    def put(self, blocks: Sequence[Block]) -> list[int]:
        ids = list(range(self._next, self._next + len(blocks)))
        self._next += len(blocks)
        self._blocks |= {number: with_id(block, number) for number, block in zip(ids, blocks, strict=True)}
        return ids

    def get(self, ids: Sequence[int]) -> list[Block]:
        return [self._blocks[number] for number in ids]

    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        mine = [b for b in self._blocks.values() if b.layer == layer and after < b.id <= generation]
        keys = np.concatenate([b.keys for b in mine]) if mine else np.zeros((0, queries.shape[1]), np.float32)
        owner = np.repeat(np.array([b.id for b in mine], np.int64), [len(b.keys) for b in mine])
        return rank_blocks(keys, owner, queries, count)

    def delete(self, source: str) -> int:
        mine = [number for number, block in self._blocks.items() if block.source == source]
        for number in mine:
            del self._blocks[number]
        self._notes.pop(source, None)
        return len(mine)

    def pin(self) -> int:
        return self._next - 1

    def compact(self) -> None: ...

    def stats(self) -> dict[str, Any]:
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
        found: dict[str, dict[str, Any]] = {
            name: {"blocks": 0, "tokens": 0, **facts} for name, facts in self._notes.items()
        }
        for block in self._blocks.values():
            entry = found.setdefault(block.source, {"blocks": 0, "tokens": 0})
            entry["blocks"] += 1
            entry["tokens"] += len(block.tokens)
        return found

    def note(self, source: str, **facts: Any) -> None:
        self._notes.setdefault(source, {}).update(facts)

    def scan(self) -> Iterator[Block]:
        yield from list(self._blocks.values())

    def close(self) -> None: ...
