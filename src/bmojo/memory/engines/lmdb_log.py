"""The log in LMDB: one memory-mapped file, readers that never wait."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmojo.errors import StoreError
from bmojo.files import optional_module
from bmojo.memory.engines.log import CHUNK, LAST, TABLES, Log, Row

MAP_SIZE = 1 << 40  # of addresses; the file is as large as what is in it
RESIDENT = 64 << 20  # bytes of the map, by estimate, before its pages are let go
DEPTH = 3 << 12  # bytes of the tree's pages that are read for an entry
AROUND = 16  # pages that Linux maps for each that is read
_open: dict[str, tuple[Any, int]] = {}  # LMDB must open a file only once a process: environment and users by path
_open_lock = threading.RLock()


class LMDBLog(Log):
    suffix = ".lmdb"

    def __init__(self, path: Path, *, new: bool = False, sync: str = "second") -> None:
        self._closed, self._read = True, 0
        self._lmdb = optional_module("lmdb", "a store in LMDB", "memory")
        self.path, self._name = path, os.path.realpath(path)
        if not new:
            _require_whole(path)
        with _open_lock, self._told():
            env, users = _open.get(self._name) or (self._environment(new, sync), 0)
            _open[self._name] = env, users + 1
        self._env, self._closed = env, False
        try:
            with self._told():
                # LMDB does not notice where its file ends, and reading there kills the process
                if path.stat().st_size < (promised := self._promised()):
                    raise StoreError(_cut(path, promised))
                self._env.reader_check()  # slots of readers that were killed
                self._mapped = _mapped(self._name)
                self._tables = {name: env.open_db(name.encode(), create=new) for name in TABLES}
        except BaseException:
            self.close()
            raise

    def _environment(self, new: bool, sync: str) -> Any:
        writable = os.access(self.path if self.path.exists() else self.path.parent, os.W_OK)
        return self._lmdb.open(
            str(self.path),
            subdir=False,
            create=new,
            readonly=not writable,
            lock=os.access(self.path.parent, os.W_OK),
            map_size=MAP_SIZE,
            max_dbs=len(TABLES),
            max_readers=1024,
            sync=sync != "close",
            metasync=sync == "block",
            readahead=False,
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._lmdb.Error as error:
            raise StoreError(
                f"{self.path} can't be used: {error}; if it is damaged, run bmojo store verify --repair"
            ) from error

    def write(self, rows: Sequence[Row]) -> None:
        with self._told():
            with self._env.begin(write=True) as transaction:
                for table, number, value in rows:
                    transaction.put(number.to_bytes(8, "big"), value, db=self._tables[table])
            # pages taken and given back within a transaction are promised, but were not written
            if self.path.stat().st_size < (promised := self._promised()):
                os.truncate(self.path, promised)

    def _promised(self) -> int:
        return (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]

    def get(self, table: str, numbers: Sequence[int]) -> list[bytes | None]:
        with self._told(), self._env.begin(db=self._tables[table]) as transaction:
            found = [transaction.get(number.to_bytes(8, "big")) if 0 <= number <= LAST else None for number in numbers]
        self._let_go(sum(len(value) for value in found if value is not None), len(found))
        return found

    def scan(self, table: str, first: int = 0, last: int = LAST) -> Iterator[tuple[int, bytes]]:
        while first <= last:
            rows, size = [], 0
            with self._told(), self._env.begin(db=self._tables[table]) as transaction:
                cursor = transaction.cursor()
                if cursor.set_range(first.to_bytes(8, "big")):
                    for key, value in cursor:
                        if (number := int.from_bytes(key, "big")) > last:
                            break
                        rows.append((number, value))
                        if (size := size + len(value)) > CHUNK:
                            break
            self._let_go(size, 1)
            yield from rows
            if size <= CHUNK:
                return
            first = rows[-1][0] + 1

    def _let_go(self, size: int, entries: int) -> None:
        """Once in a while give back the pages of the map, which else stay with the process as long as memory lasts."""
        self._read += (size + entries * DEPTH) * AROUND
        if self._read > RESIDENT:
            self._read = 0
            for first, length in self._mapped:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), 4)  # MADV_DONTNEED

    def sync(self) -> None:
        with self._told():
            self._env.sync(True)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with _open_lock:
            env, users = _open[self._name]
            if users > 1:
                _open[self._name] = env, users - 1
            else:
                del _open[self._name]
                env.close()


def _mapped(name: str) -> list[tuple[int, int]]:
    """Where in memory a file is mapped: first bytes, and lengths. Known on Linux."""
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip("\n").endswith(f" {name}")]
    return [(int(first, 16), int(last, 16) - int(first, 16)) for first, last in ranges]


def _cut(path: Path, promised: int) -> str:
    return (
        f"{path} is cut off: it has {path.stat().st_size:,} bytes and should have {promised:,}; "
        "run bmojo store verify --repair"
    )


def _require_whole(path: Path) -> None:
    """Raises StoreError for a file that LMDB would take for a new one."""
    if not path.is_file():
        raise StoreError(f"{path} is not there; put it back, or run bmojo store verify --repair to go on without")
    if not path.stat().st_size:
        raise StoreError(_cut(path, 1))
