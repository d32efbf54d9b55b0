"""The log in SQLite, with its write-ahead log: needs nothing but Python."""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from bmojo.errors import StoreError
from bmojo.memory.engines.log import CHUNK, LAST, TABLES, Log, Raw, Row

PAGE = 4096
WAIT = 60.0  # seconds for a lock that another process holds
_SYNCHRONOUS = {"block": "FULL", "second": "NORMAL", "close": "OFF"}


class SQLiteLog(Log):
    suffix = ".sqlite"

    def __init__(self, path: Path, *, new: bool = False, sync: str = "second") -> None:
        self.path, self._lock = path, threading.RLock()
        if not new:
            _require_whole(path)
        mode = "rwc" if new else "rw" if os.access(path.parent, os.W_OK) else "ro&immutable=1"
        with self._told():
            self._file = sqlite3.connect(
                f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=WAIT, isolation_level=None,
                check_same_thread=False,
            )  # fmt: skip
            try:
                if new:
                    self._file.execute(f"PRAGMA page_size = {PAGE}")
                    self._file.execute("PRAGMA journal_mode = WAL")
                    for table in TABLES:
                        self._file.execute(f"CREATE TABLE {table} (number INTEGER PRIMARY KEY, value BLOB NOT NULL)")
                self._file.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[sync]}")
                self._file.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            except BaseException:
                self._file.close()
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path} can't be used: {error}; if it is damaged, run bmojo store verify --repair"
            ) from error

    def write(self, rows: Sequence[Row]) -> None:
        with self._told():
            self._file.execute("BEGIN IMMEDIATE")
            try:
                for table, number, value in rows:
                    self._file.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (number, value))
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    def get(self, table: str, numbers: Sequence[int]) -> list[bytes | None]:
        query = f"SELECT value FROM {table} WHERE number = ?"
        with self._told():
            rows = [self._file.execute(query, (number,)).fetchone() if number <= LAST else None for number in numbers]
        return [row and row[0] for row in rows]

    def scan(self, table: str, first: int = 0, last: int = LAST) -> Iterator[tuple[int, bytes]]:
        query = f"SELECT number, value FROM {table} WHERE number BETWEEN ? AND ? ORDER BY number"
        while first <= last:
            rows, size = [], 0
            with self._told():
                for row in self._file.execute(query, (first, last)):
                    rows.append(row)
                    if (size := size + len(row[1])) > CHUNK:
                        break
            yield from rows
            if size <= CHUNK:
                return
            first = rows[-1][0] + 1

    def sync(self) -> None:
        with self._told():
            (before,) = self._file.execute("PRAGMA synchronous").fetchone()
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.execute("PRAGMA wal_checkpoint(PASSIVE)")  # syncs what it moves, and the file
            self._file.execute(f"PRAGMA synchronous = {before}")

    def close(self) -> None:
        with self._told():
            self._file.close()

    @classmethod
    @contextmanager
    def raw(cls, path: Path) -> Iterator[Raw]:
        """With what is still to be moved there from the write-ahead log.

        Source: sqlite.org/fileformat2.html, section 4.1, "WAL File Format".
        """
        waiting = path.with_name(path.name + "-wal")
        pages = list(_pages(waiting.read_bytes())) if waiting.exists() else []
        if not pages:
            with super().raw(path) as content:
                yield content
            return
        merged = path.with_name(path.name + "-merged")
        try:
            if path.exists():
                shutil.copyfile(path, merged)
            with merged.open("r+b" if merged.exists() else "w+b") as file:
                for number, page in pages:
                    file.seek((number - 1) * PAGE)
                    file.write(page)
            with super().raw(merged) as content:
                yield content
        finally:
            merged.unlink(missing_ok=True)

    @staticmethod
    def pieces(file: Raw, at: int, length: int) -> bytes:
        """A value that is too long for its page goes on in a chain of others, each after the number of the next.

        Source: sqlite.org/fileformat2.html, section 1.6, "Calculation Of Cell Payload Sizes".
        """
        serial, head = 2 * length + 12, 3  # sizes: of the head itself, the number (NULL: it is the row's), the value
        while serial >= 1 << 7 * (head - 2):
            head += 1
        payload, most, least = head + length, PAGE - 35, (PAGE - 12) * 32 // 255 - 23
        if payload <= most:
            return file[at : at + length]
        local = least + (payload - least) % (PAGE - 4)
        here = (least if local > most else local) - head
        parts, start = [file[at : at + here]], at + here
        left = length - here
        while left > 0 and start + 4 <= len(file):
            (page,) = struct.unpack_from(">I", file, start)
            start = (page - 1) * PAGE
            if page < 1 or start + 4 > len(file):
                break
            parts.append(file[start + 4 : start + 4 + min(left, PAGE - 4)])
            left -= PAGE - 4
        return b"".join(parts)


def _pages(wal: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the pages in a write-ahead log up to its last commit."""
    pending = []
    for at in range(32, len(wal) - PAGE - 23, PAGE + 24):
        number, commit = struct.unpack_from(">II", wal, at)
        if wal[at + 8 : at + 16] != wal[16:24]:  # of an earlier round
            return
        pending.append((number, wal[at + 24 : at + 24 + PAGE]))
        if commit:
            yield from pending
            pending = []


def _require_whole(path: Path) -> None:
    """Raises StoreError for a file that is not as long as its head says. What is still to be moved there from the
    write-ahead log is not missing."""
    if not path.is_file():
        raise StoreError(f"{path} is not there; put it back, or run bmojo store verify --repair to go on without")
    waiting = path.with_name(path.name + "-wal")
    with path.open("rb") as file:
        head = file.read(100)
    size = path.stat().st_size
    promised = int.from_bytes(head[28:32], "big") * PAGE if len(head) == 100 else 100
    if not size or (size < promised and not (waiting.exists() and waiting.stat().st_size)):
        raise StoreError(
            f"{path} is cut off: it has {size:,} bytes and should have {max(promised, 1):,}; "
            "run bmojo store verify --repair"
        )
