"""The engines that tests/memory/engines/test_engine_conformance.py runs on.

To add one: a fixture NAME_place that gives a function open(meta=None, mode="write" or "read") -> Engine: its first call
makes an empty store, later ones open it again. It should publish at once, or nearly. Then put NAME into ENGINES.
"""

from __future__ import annotations

import pytest

from bmojo.memory.engines import open_store
from bmojo.memory.engines.engine import MemoryEngine

ENGINES = ["memory", "lmdb", "sqlite"]


@pytest.fixture
def memory_place():
    """No files: to open it again gives the store itself."""
    opened = []

    def place(meta=None, mode="write"):
        opened.append(opened[0] if opened else MemoryEngine(meta))
        return opened[0]

    return place


def _local(folder, engine):
    def place(meta=None, mode="write"):
        return open_store(folder, meta=meta, engine=engine, mode="a" if mode == "write" else "r", publish=0)

    return place


@pytest.fixture
def lmdb_place(tmp_path):
    return _local(tmp_path / "store", "lmdb")


@pytest.fixture
def sqlite_place(tmp_path):
    return _local(tmp_path / "store", "sqlite")


@pytest.fixture(params=ENGINES)
def place(request):
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture(params=[engine for engine in ENGINES if engine != "memory"])
def lasting(request):
    """The place of a store that outlives its process."""
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture
def store(place):
    with place() as engine:
        yield engine
