"""The engine of one machine: a folder with a log, and an index derived from it.

    meta.json      what the store is: format, kind and name of the log, what was forgotten since it was last compacted,
                   and the caller's `meta`; written whole, so that each change of it is one step
    log-N.*        blocks, their keys, and what is known of their sources (`bmojo.memory.engines.log`)
    index-N-L.*    the inverted index of layer L, if there are many keys: left out, it is made again
    writer.lock    held, with its process' number in it, by the one writer

A block is there once the log has it. The index is in memory, each reader's own; it takes up what the log has when a
search asks for a generation that is newer than it. `compact` copies what is left into a new log; a reader that has the
old one open goes on with it until it next looks at meta.json, which is at its next call.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google_crc32c import value as crc32c

from bmojo.errors import StoreError
from bmojo.files import write_whole
from bmojo.memory.engines.block import Block, decode, encode, seal, unseal, with_id
from bmojo.memory.engines.engine import (
    Engine,
    Found,
    check_blocks,
    check_search,
    check_source,
    no_blocks,
    no_source,
)
from bmojo.memory.engines.index import Index
from bmojo.memory.engines.lmdb_log import LMDBLog
from bmojo.memory.engines.log import Log, Row
from bmojo.memory.engines.sqlite_log import SQLiteLog

FORMAT = 1
LOGS: dict[str, type[Log]] = {"lmdb": LMDBLog, "sqlite": SQLiteLog}
SOURCE = b"bmjS"  # magic of the frame of what is known of a source
IDS = 40  # bits of an id in the number of a key's entry, below its layer's
BATCH = 4096  # blocks that an index takes up at a time
LEFT = ("log-*", "index-*", ".*.index-*", ".meta.json.*")  # files that a process that died may have left
COPY = 64 << 20  # bytes that compact writes at a time


Keys = tuple[np.ndarray, np.ndarray, np.ndarray]


class Forgotten(NamedTuple):
    """The blocks of `source`, whose number is `number`, up to the id `upto` are hidden."""

    number: int
    source: str
    upto: int


class Manifest(NamedTuple):
    """meta.json"""

    engine: str
    log: str | None  # None: the store is being made
    forgotten: tuple[Forgotten, ...]
    meta: dict[str, Any]
    repaired: str | None = None  # the log that was made when the store was last repaired

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, **self._asdict()}
        write_whole(folder / "meta.json", json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / "meta.json"
        try:
            content = json.loads(path.read_bytes())
            version, fields = content["format"], {name: content.get(name) for name in cls._fields}
        except FileNotFoundError:
            raise StoreError(f"{folder} is no store of blocks: it has no meta.json; check the path") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}); put back a copy of it, or remove the store") from error
        if version != FORMAT:
            raise StoreError(f"{folder} is a store of format {version}, this bmojo reads {FORMAT}; update bmojo")
        if fields["engine"] not in LOGS:
            raise StoreError(f"{path} names the engine {fields['engine']!r}, known: {', '.join(LOGS)}")
        return cls(**fields | {"forgotten": tuple(Forgotten(*entry) for entry in fields["forgotten"])})

    def open_log(self, folder: Path, sync: str = "second") -> Log:
        if self.log is None:
            raise StoreError(f"{folder} is being made, or was not finished; open it for writing")
        return LOGS[self.engine](folder / self.log, sync=sync)


class Source(NamedTuple):
    """What the log keeps of a source: under a number of its own, which another of the same name does not get again."""

    number: int
    source: str
    blocks: int = 0
    tokens: int = 0
    last: int = -1  # id of its newest block
    facts: dict[str, Any] = {}
    version: int = 0

    def row(self, session: int) -> Row:
        return "sources", self.number, seal(json.dumps(self).encode(), magic=SOURCE, session=session)

    @classmethod
    def read(cls, value: bytes) -> Source:
        return cls(*json.loads(bytes(unseal(value, magic=SOURCE))))


class State(NamedTuple):
    """Of a log: the next id, how often it was opened for writing, the next number of a source, the keys' dimension."""

    next: int = 0
    session: int = 0
    sources: int = 0
    dim: int = 0  # 0: no keys yet

    def row(self) -> Row:
        body = struct.pack("<4Q", *self)
        return "state", 0, struct.pack("<I", crc32c(body)) + body

    @classmethod
    def read(cls, log: Log) -> State:
        (value,) = log.get("state", [0])
        if value is None:
            return cls()
        if len(value) != 36 or crc32c(value[4:]) != struct.unpack_from("<I", value)[0]:
            raise StoreError(f"{log.path} is damaged; run bmojo store verify --repair")
        return cls(*struct.unpack("<4Q", value[4:]))


def block_rows(block: Block, number: int, session: int) -> list[Row]:
    """What the log keeps of a block of the source with this number."""
    keys = struct.pack("<I", number) + block.keys.astype("<f2").tobytes()
    return [
        ("frames", block.id, encode(block, session=session)),
        ("keys", block.layer << IDS | block.id, struct.pack("<I", crc32c(keys)) + keys),
    ]


def read_keys(value: bytes, dim: int) -> tuple[int, np.ndarray]:
    """The number of the source, and the keys float16 [r, dim], of an entry of the table "keys"."""
    if len(value) < 8 or crc32c(value[4:]) != int.from_bytes(value[:4], "little"):
        raise StoreError("its keys are damaged")
    number = int.from_bytes(value[4:8], "little")
    return number, np.frombuffer(value, "<f2", offset=8).reshape(-1, dim)


@contextmanager
def named(log: Log, number: int) -> Iterator[None]:
    """Tells the log and the block of what is damaged."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{log.path}: block {number}: {error}; run bmojo store verify --repair") from error


def in_tables(rows: list[Row]) -> list[Row]:
    """Table by table: so entries that are read together lie together in the file."""
    return sorted(rows, key=lambda row: row[:2])


class LocalEngine(Engine):
    """A store in a folder. See `bmojo.memory.engines.open_store`, which makes and opens one."""

    def __init__(self, folder: Path, *, mode: str = "r", publish: float = 1.0, sync: str = "second") -> None:
        self.folder, self._publish, self._sync = folder, publish, sync
        self._lock, self._index_lock = threading.RLock(), threading.RLock()
        self._lock_file = lock_writer(folder) if mode == "a" else None
        self._closed, self._dirty = threading.Event(), False
        self._indexes: dict[int, Index] = {}
        self._pinned, self._looked = -1, -float("inf")
        self._failed: StoreError | None = None  # what the thread that syncs met
        self._stamp: Any = None
        self._log: Log | None = None
        self._manifest = Manifest.read(folder)
        try:
            if mode == "a":
                clean(folder)
            self._refresh()
            if mode == "a":
                self._begin_session()
        except BaseException:
            self.close()
            raise

    # what is on the disk

    def _begin_session(self) -> None:
        state = State.read(self._open_log)
        self._state = state._replace(session=state.session + 1)
        self._open_log.write([self._state.row()])
        self._records = {record.source: record for record in self._read_sources()}
        if self._sync == "second":
            threading.Thread(target=self._sync_often, name="bmojo store", daemon=True).start()

    def _sync_often(self) -> None:
        while self._failed is None and not self._closed.wait(1.0):
            with self._lock:
                if self._dirty and not self._closed.is_set():
                    self._dirty = False
                    try:
                        self._open_log.sync()
                    except StoreError as error:
                        self._failed = error

    def _refresh(self) -> None:
        """Take notice of what another process has deleted or compacted."""
        path = self.folder / "meta.json"
        try:
            status = path.stat()
        except FileNotFoundError:
            status = None
        stamp = status and (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp is not None and stamp == self._stamp:
            return
        with self._lock, self._index_lock:
            manifest = Manifest.read(self.folder)
            if self._log is None or manifest.log != self._manifest.log:
                try:
                    self._log = manifest.open_log(self.folder, self._sync)  # calls that go on keep the old one open
                except StoreError:
                    if Manifest.read(self.folder).log == manifest.log:
                        raise
                    return self._refresh()  # compacted again meanwhile
                if manifest.repaired != self._manifest.repaired:
                    self._indexes.clear()
                else:
                    left = {number for number, _ in self._log.scan("sources")}
                    for index in self._indexes.values():
                        index.drop(index.sources - left)
            self._manifest, self.meta, self._stamp = manifest, manifest.meta, stamp
            self._hidden = {entry.source: entry.upto for entry in manifest.forgotten}
            self._gone = {entry.number for entry in manifest.forgotten}
            for index in self._indexes.values():
                index.drop(self._gone)

    @property
    def _open_log(self) -> Log:
        if self._closed.is_set() or self._log is None:
            raise StoreError(f"the store {self.folder} is closed")
        return self._log

    def _read_sources(self) -> Iterator[Source]:
        for _, value in self._open_log.scan("sources"):
            record = Source.read(value)
            if record.number not in self._gone:
                yield record

    def _writing(self) -> None:
        if self._lock_file is None:
            raise StoreError(f"{self.folder} was opened to be read; open it for writing to change it")
        if self._failed is not None:
            raise self._failed
        self._refresh()

    # blocks

    def put(self, blocks: Sequence[Block]) -> list[int]:
        with self._lock:
            self._writing()
            state, changed, rows = self._state, dict[str, Source](), list[Row]()
            dim = check_blocks(blocks, state.dim or None)
            ids = list(range(state.next, state.next + len(blocks)))
            if dim is None or not ids:
                return ids
            for number, block in zip(ids, blocks, strict=True):
                record, state = self._record(block.source, changed, state)
                changed[block.source] = record._replace(
                    blocks=record.blocks + 1,
                    tokens=record.tokens + len(block.tokens),
                    last=number,
                    version=record.version + 1,
                )
                rows += block_rows(with_id(block, number), record.number, state.session)
            self._write(rows, changed, state._replace(next=state.next + len(blocks), dim=dim))
        return ids

    def _record(self, source: str, changed: dict[str, Source], state: State) -> tuple[Source, State]:
        record = changed.get(source) or self._records.get(source)
        if record is None:
            return Source(state.sources, source), state._replace(sources=state.sources + 1)
        return record, state

    def _write(self, rows: list[Row], changed: dict[str, Source], state: State) -> None:
        try:
            records = [record.row(state.session) for record in changed.values()]
            self._open_log.write(in_tables([*rows, *records, state.row()]))
        except BaseException:
            self._state = self._state._replace(session=self._state.session + 1)  # for the ids are given again
            raise
        self._dirty, self._state = True, state
        self._records |= changed

    def get(self, ids: Sequence[int]) -> list[Block]:
        self._refresh()
        log = self._open_log
        found: list[Block] = []
        missing = []
        for number, value in zip(ids, log.get("frames", ids), strict=True):
            block = None if value is None else self._decode(log, number, value)
            if block is None or self._is_hidden(block):
                missing.append(number)
            else:
                found.append(block)
        if missing:
            raise no_blocks(missing)
        return found

    def _decode(self, log: Log, number: int, value: bytes) -> Block:
        with named(log, number):
            return decode(value)

    def _is_hidden(self, block: Block) -> bool:
        return block.id <= self._hidden.get(block.source, -1)

    def scan(self) -> Iterator[Block]:
        self._refresh()
        end, after, log = State.read(self._open_log).next - 1, -1, None
        while True:
            self._refresh()
            if log is not self._open_log:  # at first, and when it was compacted
                log = self._open_log
                rows = log.scan("frames", after + 1, end)
            after, value = next(rows, (-1, b""))
            if after < 0:
                return
            if not self._is_hidden(block := self._decode(log, after, value)):
                yield block

    # search

    def pin(self) -> int:
        self._refresh()
        now = time.monotonic()
        if now - self._looked >= self._publish:
            self._pinned, self._looked = max(self._pinned, State.read(self._open_log).next - 1), now
        return self._pinned

    def search(self, layer: int, queries: np.ndarray, count: int, *, generation: int, after: int = -1) -> Found:
        self._refresh()
        with self._index_lock:
            index = self._indexes.get(layer)
            if index is None or index.last < generation:
                state = State.read(self._open_log)
                check_search(layer, queries, count, state.dim or None)
                if index is None and state.dim:
                    index = self._indexes[layer] = self._index(layer, state)
                elif index is None:
                    index = Index(0)  # of an empty store
                else:
                    self._take_up(index, layer, min(generation, state.next - 1))
            else:
                check_search(layer, queries, count, index.dim)
            return index.search(queries, count, generation=generation, after=after)

    def _index(self, layer: int, state: State) -> Index:
        """As it is made when it is first asked for."""
        path = self.folder / f"index-{_number(self._manifest.log)}-{layer}.faiss"
        index, last = Index(state.dim), state.next - 1
        index.load(path, last)
        index.drop(self._gone)
        if not self._take_up(index, layer, last, opening=True):
            index = Index(state.dim)
            index.train(keys for keys, _, _ in self._read_keys(layer, state.dim, 0, last))
            self._take_up(index, layer, last, opening=True)
        index.settle(last=True)
        if index.unsaved and os.access(self.folder, os.W_OK):
            index.save(path)
        return index

    def _take_up(self, index: Index, layer: int, last: int, *, opening: bool = False) -> bool:
        """Keys of blocks up to `last` into an index. False if in opening it is outgrown, and better made anew."""
        for keys in self._read_keys(layer, index.dim, index.last + 1, last):
            index.add(*keys)
            if opening and index.outgrown:
                return False
            if opening:
                index.settle()
        index.last = max(index.last, last)
        return True

    def _read_keys(
        self, layer: int, dim: int, first: int, last: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Keys, ids and numbers of sources as `Index.add` takes them, some blocks at a time."""
        log = self._open_log
        rows = log.scan("keys", layer << IDS | first, layer << IDS | max(last, 0))
        while some := list(itertools.islice(rows, BATCH)):
            owner, source, keys = [], [], []
            for number, value in some:
                with named(log, number % 2**IDS):
                    of, part = read_keys(value, dim)
                if of not in self._gone:
                    owner.append(number % 2**IDS)
                    source.append(of)
                    keys.append(part)
            if keys:
                each = [len(part) for part in keys]
                yield np.concatenate(keys), np.repeat(owner, each), np.repeat(np.array(source, np.int32), each)

    # sources

    def sources(self) -> dict[str, dict[str, Any]]:
        return {one.source: {"blocks": one.blocks, "tokens": one.tokens, **one.facts} for one in self._living()}

    def _living(self) -> list[Source]:
        self._refresh()
        with self._lock:
            return list(self._records.values() if self._lock_file else self._read_sources())

    def note(self, source: str, **facts: Any) -> None:
        check_source(source)
        with self._lock:
            self._writing()
            record, state = self._record(source, {}, self._state)
            record = record._replace(facts=record.facts | facts, version=record.version + 1)
            self._write([], {source: record}, state)

    def delete(self, source: str) -> int:
        with self._lock:
            self._writing()
            if source not in self._records:
                raise no_source(source, self._records)
            gone = Forgotten(self._records[source].number, source, self._state.next - 1)
            self._manifest._replace(forgotten=(*self._manifest.forgotten, gone)).write(self.folder)
            blocks = self._records.pop(source).blocks
            self._refresh()
        return blocks

    def stats(self) -> dict[str, Any]:
        sources, log = self._living(), self._open_log
        gone = [Source.read(value) for value in log.get("sources", sorted(self._gone)) if value is not None]
        return {
            "engine": self._manifest.engine,
            "blocks": sum(one.blocks for one in sources),
            "tokens": sum(one.tokens for one in sources),
            "deleted": sum(one.blocks for one in gone),
            "sources": len(sources),
            "bytes": sum(path.stat().st_blocks * 512 for path in self.folder.iterdir() if path.is_file()),
            "generation": State.read(log).next - 1,
        }

    # files

    def compact(self) -> None:
        with self._lock:
            self._writing()
            replace_log(self.folder, self._manifest, self._kept_rows(), self._state)
            self._refresh()
            clean(self.folder)

    def _kept_rows(self) -> Iterator[Row]:
        log = self._open_log
        for number, value in log.scan("frames"):
            if not self._is_hidden(block := self._decode(log, number, value)):
                entry = block.layer << IDS | number
                (keys,) = log.get("keys", [entry])
                with named(log, number):
                    read_keys(keys or b"", self._state.dim)
                yield from [("frames", number, value), ("keys", entry, keys or b"")]
        yield from (record.row(self._state.session) for record in self._records.values())

    def close(self) -> None:
        if self._closed.is_set():
            return
        with self._lock, self._index_lock:
            if self._log is not None:
                if self._lock_file is not None:
                    self._log.sync()
                self._log.close()
            self._closed.set()
            if self._lock_file is not None:
                self._lock_file.close()


def make_store(folder: Path, engine: str, meta: dict[str, Any]) -> None:
    """An empty store. Raises StoreError for a folder with the log of one."""
    if any(folder.glob("log-*")):
        raise StoreError(f"{folder} has a log but no meta.json: put it back, or remove the folder")
    Manifest(engine, None, (), meta).write(folder)


def lock_writer(folder: Path) -> Any:
    """The lock of the one writer, until it is closed or its process ends. Raises StoreError if another has it."""
    try:
        file = open(folder / "writer.lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"{folder} can't be opened for writing: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        who = f"process {holder}" if holder else "another process"
        raise StoreError(f"{folder} is being written by {who}; wait for it, or open the store to read") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def clean(folder: Path) -> None:
    """Finish what a process that died has left: a store that was being made, logs that were replaced, their indexes."""
    manifest = Manifest.read(folder)
    for path in [path for pattern in LEFT for path in folder.glob(pattern)]:
        if manifest.log is None or _number(path.name) != _number(manifest.log):
            path.unlink()
    if manifest.log is None:
        name = f"log-1{LOGS[manifest.engine].suffix}"
        LOGS[manifest.engine](folder / name, new=True).close()
        manifest._replace(log=name).write(folder)


def replace_log(folder: Path, manifest: Manifest, rows: Iterable[Row], state: State, *, repaired: bool = False) -> None:
    """Put a new log with these rows in the place of the one there is. The step that counts is that of meta.json; what
    a process that dies leaves is removed when the store is next opened for writing."""
    name = f"log-{_number(manifest.log) + 1}{LOGS[manifest.engine].suffix}"
    for path in folder.glob(name + "*"):
        path.unlink()
    log = LOGS[manifest.engine](folder / name, new=True, sync="close")
    try:
        batch, size = [state.row()], 0
        for row in rows:
            batch.append(row)
            if (size := size + len(row[2])) > COPY:
                log.write(in_tables(batch))
                batch, size = [], 0
        log.write(in_tables(batch))
        log.sync()
    finally:
        log.close()
    manifest._replace(log=name, forgotten=(), repaired=name if repaired else manifest.repaired).write(folder)


def _number(name: str | None) -> int:
    """N of "log-N.lmdb" and "index-N-L.faiss"; 0 where there is none."""
    found = re.match(r"(?:log|index)-(\d+)", name or "")
    return int(found[1]) if found else 0
