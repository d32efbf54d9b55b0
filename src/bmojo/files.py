"""Files written whole or not at all, and optional packages: what every part of the library needs of the system."""

from __future__ import annotations

import errno
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmojo.errors import BMojoError, MissingPackageError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a full disk leaves the old one, or none, never half of one.

    Raises BMojoError if it can't be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise BMojoError(
                f"can't write {path}: {error.strerror}; nothing was overwritten, and what was finished stays valid"
            ) from error
        raise


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Holds the lock file `path` of one process at a time; the system frees it however its holder ends.

    Raises BMojoError, `otherwise`, if another one holds it.
    """
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BMojoError(otherwise) from None
        yield


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turns the system's word that the disk of `folder` is full into BMojoError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BMojoError(
            f"no space left on the disk of {folder}; what was finished stays valid: free some space and run it again"
        ) from error


def optional_module(module: str, purpose: str, extra: str = "train") -> Any:
    """A module that only an extra brings; MissingPackageError says which if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingPackageError(f"{purpose} needs the package {package}: pip install 'bmojo[{extra}]'") from error
