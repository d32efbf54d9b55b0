"""Blocks in LanceDB: files in a folder of this machine, or the same in a bucket of an object storage.

Four tables, each a row of versions of its own:

    info      name, value (JSON): format, meta, `next` (an id that newer blocks do not go below), `deleted` (blocks that
              were deleted and not yet removed; null: nothing was)
    notes     source, facts (JSON)
    blocks    id, source, tokens (how many), frame (as in block.py)
    keys      block, layer, source, key float32 [dim]

A put adds to `keys`, then to `blocks`, whose commit publishes it: keys without a block have ids that no generation
reaches, and the next writer removes them. Every call looks for the newest versions first. Searches are exact: the scan
of all keys that pass the filter.

One writer: on a local path it holds a lock; in an object storage, which has none, a second one is found out when it
writes.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np

from bmojo.errors import StoreError
from bmojo.files import optional_module
from bmojo.memory.engines.block import Block, decode, encode, with_id
from bmojo.memory.engines.engine import (
    Engine,
    Found,
    best_blocks,
    check_blocks,
    check_meta,
    check_search,
    check_source,
    no_blocks,
    no_source,
)
from bmojo.memory.engines.local import lock_writer

FORMAT = 1
PAGE = 256  # blocks that are read at once
PUTS = 64  # after so many, if they make up a quarter of the store, their files are merged
KEPT = timedelta(minutes=10)  # versions that are superseded stay for readers that are at them
FAILURES = RuntimeError, OSError, ValueError  # what LanceDB raises
T = TypeVar("T")


def open_lancedb(url: str, meta: dict[str, Any] | None = None, mode: str = "r") -> LanceEngine:
    """The store at `url`: lancedb://PATH, or the URL of an object storage after lancedb+, as lancedb+s3://bucket/name.
    With mode "a" it is opened for writing, and made if it is not there.

    Raises StoreError if it can't be reached or made, or it is not as asked for.
    """
    scheme, _, place = url.partition("://")
    uri = place if scheme == "lancedb" else f"{scheme.removeprefix('lancedb+')}://{place}"
    if not place or not scheme.startswith("lancedb"):
        raise StoreError(f"{url} is no URL of a store: expected lancedb://PATH or, for one, lancedb+s3://BUCKET/NAME")
    return LanceEngine(uri, meta, mode)


class LanceEngine(Engine):
    """See the head of this file. uri: a path, or what LanceDB connects to."""

    def __init__(self, uri: str, meta: dict[str, Any] | None = None, mode: str = "r") -> None:
        self._lance = optional_module("lancedb", "a store in LanceDB", "lancedb")
        self._arrow = optional_module("pyarrow", "a store in LanceDB", "lancedb")
        self._where, self._writes, self._lock = f"the store {uri}", mode == "a", RLock()
        self._folder = None if "://" in uri else Path(uri)
        self._held: Any = None
        self._database: Any = None
        self._blocks: Any = None
        self._keys: Any = None
        self._dim: int | None = None
        self._next, self._seen = 0, -1  # the id after those of version `_seen` of the blocks
        self._puts = self._fresh = 0  # since files were merged: puts, and the blocks in them
        self._clean = False  # whether all keys are known to have their blocks
        try:
            with self._told():
                self._open(uri, meta)
        except BaseException:
            self.close()
            raise

    def _open(self, uri: str, meta: dict[str, Any] | None) -> None:
        absent = StoreError(f"{self._where} is not there: put something into it first")
        if self._folder is not None and self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = lock_writer(self._folder)
        elif self._folder is not None and not self._folder.is_dir():
            raise absent
        self._database = self._lance.connect(uri, read_consistency_interval=timedelta(0))
        if "info" not in self._tables():
            if not self._writes:
                raise absent
            text = self._arrow.string()
            self._make("notes", source=text, facts=text)
            facts = {"format": FORMAT, "meta": meta or {}, "next": 0, "deleted": None}
            self._database.create_table("info", self._rows(facts))
        self._info, self._notes = (self._database.open_table(name) for name in ("info", "notes"))
        if (form := self._fact("format")) > FORMAT:
            raise StoreError(f"{self._where} has format {form}, this bmojo reads up to {FORMAT}; update bmojo")
        self.meta = self._fact("meta")
        check_meta(self.meta, meta, self._where)
        self._look()

    # tables

    def _tables(self) -> list[str]:
        return self._database.list_tables().tables

    def _make(self, name: str, **columns: Any) -> Any:
        return self._database.create_table(name, schema=self._arrow.schema(columns.items()), exist_ok=True)

    def _make_tables(self, dim: int) -> None:
        number, text, size = self._arrow.int64(), self._arrow.string(), self._arrow.int32()
        key = self._arrow.list_(self._arrow.float32(), dim)
        self._make("blocks", id=number, source=text, tokens=size, frame=self._arrow.large_binary())
        self._make("keys", block=number, layer=size, source=text, key=key)
        self._open_tables()
        self._index()

    def _open_tables(self) -> None:
        keys = self._database.open_table("keys")
        self._blocks, self._dim = self._database.open_table("blocks"), keys.schema.field("key").type.list_size
        self._keys = keys  # last, as a sign to other threads

    def _index(self) -> None:
        self._blocks.create_index("id", config=self._lance.index.BTree())
        self._seen = self._blocks.version

    def _rows(self, facts: dict[str, Any]) -> Any:
        """Of the table `info`."""
        return self._arrow.table({"name": list(facts), "value": [json.dumps(fact) for fact in facts.values()]})

    def _fact(self, name: str) -> Any:
        return json.loads(self._select(self._info, "value", f"name = {_text(name)}")["value"][0].as_py())

    def _tell(self, **facts: Any) -> None:
        _replace(self._info, "name", self._rows(facts))

    @staticmethod
    def _select(table: Any, columns: str, where: str | None = None) -> Any:
        """An Arrow table with these columns of all rows that fit."""
        query = table.search().select(columns.split()).limit(None)
        return (query if where is None else query.where(where)).to_arrow()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FAILURES as error:
            line = (str(error).strip() or repr(error)).splitlines()[0]
            line = re.sub(r",? \S+\.rs:\d+:\d+", "", line)  # where in LanceDB's source
            raise StoreError(f"{self._where}: {line}") from error

    def _read(self, ask: Callable[..., T], *values: Any) -> T:
        """What `ask(*values)` gives; again, if the files that it was reading may have been compacted away."""
        if self._database is None:
            raise StoreError(f"{self._where} is closed")
        for _ in range(2):
            try:
                return ask(*values)
            except StoreError:
                raise
            except FAILURES:
                continue
        with self._told():
            return ask(*values)

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._writes:
            raise StoreError(f"{self._where} was opened to read; open it for writing to change it")
        if self._database is None:
            raise StoreError(f"{self._where} is closed")
        with self._lock, self._told():
            yield

    def _expect(self, version: int) -> None:
        """Raises StoreError unless this is the version of the blocks, so that nobody else has written."""
        if self._blocks is not None and self._blocks.version != version:
            raise StoreError(f"{self._where} was written to by another process meanwhile; let only one do so")
        self._seen = version

    def _look(self) -> None:
        """For what others have put."""
        if self._keys is None:
            if not {"blocks", "keys"} <= set(self._tables()):
                return
            self._open_tables()
        if (version := self._blocks.version) != self._seen:
            newer = self._select(self._blocks, "id", f"id >= {self._next}")["id"].to_pylist()
            self._next = max(self._fact("next"), self._next, *(number + 1 for number in newer))
            self._seen = version

    def _there(self) -> bool:
        """Whether anything was ever put."""
        if self._keys is None and not self._writes:
            self._look()
        return self._keys is not None

    # the interface

    def put(self, blocks: Sequence[Block]) -> list[int]:
        with self._change():
            dim = check_blocks(blocks, self._dim)
            if not blocks or dim is None:
                return []
            if self._keys is None:
                self._make_tables(dim)
            self._expect(self._seen)
            if not self._clean:
                self._keys.delete(f"block >= {self._next}")
            ids = list(range(self._next, self._next + len(blocks)))
            self._clean = False
            self._keys.add(self._key_rows(ids, blocks))
            frames = [encode(with_id(block, number)) for number, block in zip(ids, blocks, strict=True)]
            columns = ids, [block.source for block in blocks], [len(block.tokens) for block in blocks], frames
            self._blocks.add(self._arrow.table(list(columns), schema=self._blocks.schema))
            self._expect(self._seen + 1)
            self._clean, self._next = True, self._next + len(blocks)
            self._merge(len(blocks))
        return ids

    def _key_rows(self, ids: Sequence[int], blocks: Sequence[Block]) -> Any:
        counts = [len(block.keys) for block in blocks]
        keys = np.concatenate([block.keys for block in blocks]).astype(np.float32)
        columns = (
            np.repeat(ids, counts),
            np.repeat([block.layer for block in blocks], counts),
            [name for block in blocks for name in [block.source] * len(block.keys)],
            self._arrow.FixedSizeListArray.from_arrays(keys.ravel(), self._dim),
        )
        return self._arrow.table(list(columns), schema=self._keys.schema)

    def _merge(self, count: int) -> None:
        self._puts, self._fresh = self._puts + 1, self._fresh + count
        if self._puts >= PUTS and 4 * self._fresh >= self._next:
            for table in (self._keys, self._blocks):
                table.optimize(cleanup_older_than=KEPT)
            self._puts, self._fresh, self._seen = 0, 0, self._blocks.version

    def get(self, ids: Sequence[int]) -> list[Block]:
        if not ids:
            return []
        frames: dict[int, bytes] = {}
        if self._read(self._there):
            asked = f"id in ({', '.join(map(str, set(ids)))})"
            rows = self._read(self._select, self._blocks, "id frame", asked)
            frames = dict(zip(rows["id"].to_pylist(), rows["frame"].to_pylist(), strict=True))
        if missing := set(ids) - frames.keys():
            raise no_blocks(missing)
        return [decode(frames[number]) for number in ids]

    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        there = self._read(self._there)
        check_search(layer, queries, count, self._dim)
        found = Found(
            np.full((len(queries), count), -np.inf, np.float32), np.full((len(queries), count), -1, dtype=np.int64)
        )
        pending, limit = np.arange(len(queries)), 2 * count
        while there and len(pending):
            rows = self._read(self._nearest, layer, queries[pending], limit, generation, after)
            owner, score = rows["block"].to_numpy(), 1 - rows["_distance"].to_numpy()
            # of one query, its index is not told
            which = rows["query_index"].to_numpy() if len(pending) > 1 else np.zeros(len(owner))
            again = []
            for index, row in enumerate(pending):
                mine = np.flatnonzero(which == index)
                best = mine[best_blocks(score[mine], owner[mine], count)]
                # more keys of the last score may have been left out, or all of other blocks
                if len(mine) == limit and (len(best) < count or score[best[-1]] == score[mine].min()):
                    again.append(row)
                else:
                    found.score[row, : len(best)], found.id[row, : len(best)] = score[best], owner[best]
            pending, limit = np.array(again, int), 2 * limit
        return found

    def _nearest(self, layer: int, queries: np.ndarray, limit: int, generation: int, after: int) -> Any:
        """The nearest keys: query_index, block, and _distance, which is one less the inner product."""
        return (
            self._keys.search(queries, vector_column_name="key")
            .distance_type("dot")
            .bypass_vector_index()
            .where(f"layer = {layer} and block > {after} and block <= {generation}", prefilter=True)
            .select(["block", "_distance"])
            .limit(limit)
            .to_arrow()
        )

    def delete(self, source: str) -> int:
        with self._change():
            mine = f"source = {_text(source)}"
            count = self._blocks.count_rows(mine) if self._blocks is not None else 0
            if not count and not self._notes.count_rows(mine):
                raise no_source(source, self.sources())
            self._expect(self._seen)
            self._tell(next=self._next, deleted=(self._fact("deleted") or 0) + count)
            if count:
                self._keys.delete(mine)
                self._blocks.delete(mine)
                self._seen = self._blocks.version
            self._notes.delete(mine)
        return count

    def pin(self) -> int:
        if not self._writes:
            self._read(self._look)
        return self._next - 1

    def compact(self) -> None:
        """Writes all tables anew if something was deleted, for LanceDB's own compaction leaves files be of which less
        than a tenth was deleted; then removes all versions but the newest. A reader that was at one looks again."""
        with self._change():
            self._expect(self._seen)
            tables = [self._notes, *filter(None, (self._keys, self._blocks))]
            if self._fact("deleted") is not None:
                for table in tables:
                    rows = table.search().limit(None).to_batches(PAGE)
                    table.add(self._arrow.RecordBatchReader.from_batches(table.schema, rows), mode="overwrite")
                if self._keys is not None:
                    self._index()
            for table in (*tables, self._info):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "optimize")  # that readers at older versions will fail
                    table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
            self._tell(deleted=None)
            self._puts = self._fresh = 0
            self._seen = self._blocks.version if self._blocks is not None else -1

    def stats(self) -> dict[str, Any]:
        sources = self.sources().values()
        deleted = self._read(self._fact, "deleted")
        if self._folder is None:
            tables = [self._info, self._notes, *filter(None, (self._keys, self._blocks))]
            size = sum(table.stats()["total_bytes"] for table in tables)  # of the newest versions
        else:
            size = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        return {
            "engine": "lancedb",
            "blocks": sum(source["blocks"] for source in sources),
            "tokens": sum(source["tokens"] for source in sources),
            "deleted": deleted or 0,
            "sources": len(sources),
            "bytes": size,
            "generation": self.pin(),
        }

    def sources(self) -> dict[str, dict[str, Any]]:
        notes = self._read(self._select, self._notes, "source facts")
        found: dict[str, dict[str, Any]] = {
            name: {"blocks": 0, "tokens": 0, **json.loads(facts)}
            for name, facts in zip(notes["source"].to_pylist(), notes["facts"].to_pylist(), strict=True)
        }
        if self._read(self._there):
            rows = self._read(self._select, self._blocks, "source tokens")
            sums = rows.group_by("source").aggregate([("tokens", "count"), ("tokens", "sum")])
            for row in sums.to_pylist():
                entry = found.setdefault(row["source"], {})
                entry |= {"blocks": row["tokens_count"], "tokens": row["tokens_sum"]}
        return found

    def note(self, source: str, **facts: Any) -> None:
        check_source(source)
        with self._change():
            known = self._select(self._notes, "facts", f"source = {_text(source)}")["facts"].to_pylist()
            new = json.dumps(json.loads(known[0] if known else "{}") | facts)
            _replace(self._notes, "source", self._arrow.table({"source": [source], "facts": [new]}))

    def scan(self) -> Iterator[Block]:
        end = self.pin()
        for first in range(0, end + 1, PAGE):
            page = f"id >= {first} and id < {min(first + PAGE, end + 1)}"
            rows = self._read(self._select, self._blocks, "id frame", page).sort_by("id")
            yield from map(decode, rows["frame"].to_pylist())

    def close(self) -> None:
        with self._lock:
            if self._held is not None:
                self._held.close()
            self._database = self._held = None


def _text(value: str) -> str:
    """A text in LanceDB's SQL, in which only the quote needs care."""
    return "'" + value.replace("'", "''") + "'"


def _replace(table: Any, column: str, rows: Any) -> None:
    """Put rows in the place of those with the same value of a column, or add them."""
    table.merge_insert(column).when_matched_update_all().when_not_matched_insert_all().execute(rows)
