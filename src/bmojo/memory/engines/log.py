"""What the local engine writes to: a file of ordered maps that changes in transactions."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TABLES = ("frames", "keys", "sources", "state")
LAST = 2**63 - 1
CHUNK = 4 << 20  # bytes that a scan holds at a time
SYNC = ("block", "second", "close")

Row = tuple[str, int, bytes]
Raw = mmap.mmap | bytes


class Log(ABC):
    """Maps from numbers in [0, LAST] to bytes, one a table of `TABLES`, in one file `path`. Safe from several threads.

    `sync` says what a write waits for; what each promises is in `open_store`. All methods raise StoreError that names
    the file where it is damaged or can't be written.
    """

    path: Path
    suffix: str

    @abstractmethod
    def __init__(self, path: Path, *, new: bool = False, sync: str = "second") -> None:
        """Open a file that is there, or make a `new` one. Raises StoreError for one that is cut off."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Set all of (table, number, bytes), or none: once it returns, the death of the process loses none."""

    @abstractmethod
    def get(self, table: str, numbers: Sequence[int]) -> list[bytes | None]: ...

    @abstractmethod
    def scan(self, table: str, first: int = 0, last: int = LAST) -> Iterator[tuple[int, bytes]]:
        """Entries of numbers in [first, last], ascending. Sees some state of each entry, not one state of all."""

    @abstractmethod
    def sync(self) -> None:
        """Wait until all that was written is on the disk."""

    @abstractmethod
    def close(self) -> None: ...

    def __del__(self) -> None:
        try:  # noqa: SIM105 - contextlib may be gone
            self.close()
        except (AttributeError, TypeError):  # it was never opened, or the interpreter is being taken down
            pass

    # for salvage

    @classmethod
    @contextmanager
    def raw(cls, path: Path) -> Iterator[Raw]:
        """The bytes of a log's file, be it whole or not; none if there is no file."""
        if not path.exists() or not path.stat().st_size:
            yield b""
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content

    @staticmethod
    def pieces(file: Raw, at: int, length: int) -> bytes:
        """The `length` bytes of a value whose first byte is `file[at]`, as far as they are there."""
        return file[at : at + length]
