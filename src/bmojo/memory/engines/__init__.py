"""Where blocks of tokens are kept and found again: one small interface, and the engines behind it."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from bmojo.errors import StoreError, nearest
from bmojo.memory.engines.block import Block, decode, encode
from bmojo.memory.engines.engine import Engine, Found, check_meta

__all__ = ["Block", "Engine", "Found", "decode", "encode", "open_store"]

LOCAL = ("lmdb", "sqlite")
SYNC = ("block", "second", "close")


def open_store(
    path: str | Path,
    *,
    meta: dict[str, Any] | None = None,
    engine: str | None = None,
    mode: str = "r",
    publish: float = 1.0,
    sync: str = "second",
) -> Engine:
    """Open a store of blocks; with mode "a" for writing, and a new one if there is none.

    path      a folder; or the URL of a store that others keep, as text: postgresql://user@host/database?store=NAME (see
              `bmojo.memory.engines.pgvector`), lancedb://FOLDER, lancedb+s3://BUCKET/NAME (see `...lancedb`); these
              have no `engine`, `publish` at once, and are as safe from a power failure as they are set up to be
    meta      what its blocks must fit: kept in a new store, compared with that of one that is there
    engine    of a new store: "lmdb" (the default), or "sqlite" (the default where lmdb isn't installed)
    mode      "r" or "a"; any number of processes may read while one writes
    publish   seconds after which at the latest `pin` tells of what was put
    sync      No death of a process loses what `put` has returned. The power failing loses at most what was put
              "block"   after the last put: each waits for the disk
              "second"  in the last second or so; the log stays whole
              "close"   since the store was opened, and the log may have to be repaired: for loading much at once

    Raises StoreError for a store that is damaged, not there, of another model or being written, MissingPackageError.
    """
    if mode not in ("r", "a"):
        raise StoreError(f"a store is opened with mode 'r' or 'a', got {mode!r}")
    if sync not in SYNC:
        raise StoreError(f"unknown sync {sync!r}; {nearest(sync, SYNC)}")
    if engine is not None and engine not in LOCAL:
        raise StoreError(f"unknown engine {engine!r}; {nearest(engine, LOCAL)}")
    scheme = str(path).partition("://")[0] if "://" in str(path) else ""
    if scheme and engine is not None:
        raise StoreError(f"engine={engine!r} is for a folder; the URL {scheme}://... says itself which one it is")
    if scheme in ("postgresql", "postgres"):
        from bmojo.memory.engines.pgvector import open_pgvector

        return open_pgvector(str(path), meta, mode)
    if scheme.startswith("lancedb"):
        from bmojo.memory.engines.lancedb import open_lancedb

        return open_lancedb(str(path), meta, mode)
    if scheme:
        raise StoreError(f"no store can be opened by {scheme}://; {nearest(scheme, ['postgresql', 'lancedb'])}")
    from bmojo.memory.engines.local import LocalEngine, Manifest, make_store

    folder = Path(path)
    if mode == "a" and not (folder / "meta.json").exists():
        make_store(folder, engine or _default(), meta or {})
    stored = Manifest.read(folder)
    if engine not in (None, stored.engine):
        raise StoreError(f"{folder} is a store of the engine {stored.engine}, not {engine}; use another folder")
    check_meta(stored.meta, meta, str(folder))
    return LocalEngine(folder, mode=mode, publish=publish, sync=sync)


def _default() -> str:
    if importlib.util.find_spec("lmdb") is not None:
        return "lmdb"
    warnings.warn("lmdb isn't installed: the store is kept in SQLite; pip install 'bmojo[memory]'", stacklevel=3)
    return "sqlite"
