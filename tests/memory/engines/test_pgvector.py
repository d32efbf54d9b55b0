"""What is PostgreSQL's own in the engine over pgvector; the rest is in test_engine_conformance.py."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import numpy as np
import psycopg
import pytest

from bmojo.errors import StoreError
from bmojo.memory.engines import Block
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.engines.pgvector import open_pgvector

pytestmark = pytest.mark.slow


def some_blocks(rng, count, source="a", dim=16) -> list[Block]:
    return [
        Block(
            int(rng.integers(2)), source, i, np.zeros(3, np.int32), *np.zeros((2, 3, 1, 4), np.float16),
            rng.standard_normal((3, dim)).astype(np.float16), np.zeros(3, np.float32),
        ) for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def url(postgres):
    return f"{postgres}&store=own{secrets.token_hex(4)}"


@pytest.fixture
def admin(postgres):
    with psycopg.connect(postgres, autocommit=True) as connection:
        yield connection


def test_the_graph_finds_what_an_exact_search_finds_in_ranges_too(url, rng):
    """Without iterative scans, few blocks of a range would pass the filter, which comes after the graph."""
    exact = MemoryEngine()
    with open_pgvector(f"{url}&index=hnsw", mode="a") as store:
        for _ in range(2):
            blocks = some_blocks(rng, 200)
            store.put(blocks), exact.put(blocks)
        store._reader.execute("set enable_seqscan = off")  # so small a table would be read whole
        store._reader.execute("set enable_bitmapscan = off")
        queries = rng.standard_normal((8, 16)).astype(np.float32)
        for generation, after in [(399, -1), (250, 150), (399, 350), (40, -1)]:
            found, every = (e.search(1, queries, 10, generation=generation, after=after) for e in (store, exact))
            assert (np.diff(found.score) <= 0).all()
            assert (found.id >= 0).all()
            recall = np.mean(
                [len(set(f) & set(e)) / 10 for f, e in zip(found.id.tolist(), every.id.tolist(), strict=True)]
            )
            assert recall > 0.9, (generation, after)
        store._reader.execute("set hnsw.max_scan_tuples = 1")  # pgvector gives up; the search does not
        found, every = (e.search(1, queries, 30, generation=399, after=350) for e in (store, exact))
        assert [*map(set, found.id.tolist())] == [*map(set, every.id.tolist())]
        plan = store._ask(
            "explain select block from keys where layer = 1 order by key <#> %s::halfvec limit 5", str([0.0] * 16)
        )
        assert "Index Scan using keys_1" in str(plan)


def test_the_graph_is_made_when_it_is_asked_for_and_an_exact_search_does_not_use_it(url, rng):
    exact, blocks = MemoryEngine(), some_blocks(rng, 200)
    exact.put(blocks)
    with open_pgvector(url, mode="a") as store:
        store.put(blocks)
    open_pgvector(f"{url}&index=hnsw", mode="a").close()
    with open_pgvector(url) as store:
        store._reader.execute("set enable_seqscan = off")
        queries = rng.standard_normal((20, 16)).astype(np.float32)
        found, every = (e.search(0, queries, 20, generation=199) for e in (store, exact))
        np.testing.assert_allclose(found.score, every.score, atol=0.02)


def test_compaction_erases_from_the_tables(url, admin, rng):
    folder = Path(admin.execute("show data_directory").fetchone()[0])
    secret = secrets.token_hex(12)

    def holders() -> list[Path]:
        admin.execute("checkpoint")
        return [f for f in (folder / "base").rglob("*") if f.is_file() and secret.encode() in f.read_bytes()]

    with open_pgvector(url, mode="a") as store:
        store.put(some_blocks(rng, 5, "kept") + some_blocks(rng, 5, secret))
        store.note(secret, title=secret)
        assert holders()
        store.delete(secret)
        store.compact()
        assert not holders()
        assert store.stats()["blocks"] == 5


def test_compaction_tells_of_transactions_that_still_see_what_was_deleted(url, admin, rng, monkeypatch):
    monkeypatch.setattr("bmojo.memory.engines.pgvector.PATIENCE", 0.1)
    with open_pgvector(url, mode="a") as store:
        store.put(some_blocks(rng, 2))
        store.delete("a")
        with admin.transaction():
            admin.execute("set transaction isolation level repeatable read")
            admin.execute("select 1 from pg_class")
            with pytest.raises(StoreError, match="hidden but not yet erased"):
                store.compact()
        assert store.stats()["deleted"] == 2
        store.compact()
        assert store.stats()["deleted"] == 0


def test_a_writer_that_is_gone_leaves_no_lock(url, admin):
    store = open_pgvector(url, mode="a")
    with pytest.raises(StoreError, match=r"being written to by another process \(bmojo .*:\d+\)"):
        open_pgvector(url, mode="a")
    admin.execute("select pg_terminate_backend(%s)", (store._writer.info.backend_pid,))
    with pytest.raises(StoreError, match="terminat"):
        store.note("a", x=1)
    open_pgvector(url, mode="a").close()
    store.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://nobody@127.0.0.1:9/db?store=x", "store 'x' at 127.0.0.1/db: .*refused"),
        ("postgresql://nobody@127.0.0.1:nine/db", "invalid"),
        ("postgresql:///db?host=/nowhere/at/all", "at /nowhere/at/all/db: .*No such file"),
        ("postgresql:///db?hots=x", "hots"),
        ("postgresql://[::1/db", "can't be read"),
        ("postgresql:///db?index=hsnw", "did you mean 'hnsw'"),
        ("postgresql:///db?store=" + 32 * "é", "1 to 63 bytes"),
        ("postgresql:///db?store=", "1 to 63 bytes"),
        ("postgresql:///db?index=hnsw&ef_search=many", "ef_search='many'.* 1 to 1000"),
    ],
)
def test_wrong_urls(url, told):
    with pytest.raises(StoreError, match=told) as caught:
        open_pgvector(url, mode="a")
    assert "\n" not in str(caught.value)


def test_passwords_are_not_told():
    with pytest.raises(StoreError) as caught:
        open_pgvector("postgresql://me:secret@127.0.0.1:9/db?password=hidden", mode="a")
    assert not re.search("secret|hidden", str(caught.value))


def test_a_database_that_is_not_there(postgres):
    with pytest.raises(StoreError, match='database "nothere" does not exist'):
        open_pgvector(postgres.replace("/postgres?", "/nothere?"), mode="a")


def test_a_database_without_the_extension(postgres, admin):
    name = f"plain{secrets.token_hex(4)}"
    admin.execute(f"create database {name}")
    admin.execute(f"create role {name} login")
    other = postgres.replace("/postgres?", f"/{name}?")
    with pytest.raises(StoreError, match=r"needs the extension pgvector 0\.8 or newer, the database has none"):
        open_pgvector(other)
    with pytest.raises(StoreError, match='permission denied to create extension "vector"'):
        open_pgvector(other.replace("postgres:@", f"{name}@"), mode="a")
    open_pgvector(other, mode="a").close()
    with pytest.raises(StoreError, match="permission denied"):
        open_pgvector(other.replace("postgres:@", f"{name}@"), mode="a")  # to read another's store
    admin.execute(f"drop database {name}")
    admin.execute(f"drop role {name}")


def test_others_read_what_they_are_granted(url, admin, rng):
    name = url.rpartition("=")[2]
    with open_pgvector(url, mode="a") as store:
        store.put(some_blocks(rng, 20))
    admin.execute(f"create role {name} login")
    other = url.replace("postgres:@", f"{name}@")
    with pytest.raises(StoreError, match="permission denied"):
        open_pgvector(other)
    admin.execute(f"grant usage on schema {name} to {name}; grant select on all tables in schema {name} to {name}")
    with open_pgvector(f"{other}&options=-c%20work_mem%3D7MB") as store:
        assert store.search(0, np.ones((1, 16), np.float32), 9, generation=store.pin()).id.max() >= 0
        assert len(store.get([0, 1])) == 2
        assert store.stats()["blocks"] == 20
        assert store._ask("show work_mem") == [("7MB",)]
    with pytest.raises(StoreError, match="permission denied"):
        open_pgvector(other, mode="a").put(some_blocks(rng, 1))


def test_stores_of_other_formats(url, admin):
    open_pgvector(url, mode="a").close()
    name = url.rpartition("=")[2]
    admin.execute(f"update {name}.store set format = 7")
    for mode in "ra":
        with pytest.raises(StoreError, match="has format 7, this bmojo reads up to 1; update bmojo"):
            open_pgvector(url, mode=mode)
    admin.execute(f"drop table {name}.store; create table {name}.store (x int)")
    with pytest.raises(StoreError, match="column"):
        open_pgvector(url, mode="a")


def test_a_damaged_frame_is_refused(url, admin, rng):
    with open_pgvector(url, mode="a") as store:
        store.put(some_blocks(rng, 2))
        name = url.rpartition("=")[2]
        admin.execute(f"update {name}.blocks set frame = set_byte(frame, 200, 255 - get_byte(frame, 200)) where id = 1")
        assert store.get([0])[0].id == 0
        with pytest.raises(StoreError, match="checksum"):
            store.get([1])
