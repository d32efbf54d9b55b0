"""What is LanceDB's own in the engine over it; the rest is in test_engine_conformance.py."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys

import numpy as np
import pytest

from bmojo.errors import StoreError
from bmojo.memory.engines import Block, lancedb, open_store
from bmojo.memory.engines.engine import rank_blocks


def some_blocks(count, source="a", keys=None) -> list[Block]:
    rng = np.random.default_rng(0)
    return [
        Block(
            0, source, i, np.zeros(3, np.int32), *np.zeros((2, 3, 1, 4), np.float16),
            (rng.standard_normal((2, 8)) if keys is None else keys).astype(np.float16), np.zeros(3, np.float32),
        ) for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def url(folder):
    return f"lancedb://{folder}"


def test_compaction_erases_even_little_from_a_large_file(folder, url):
    """LanceDB's own would leave it: less than a tenth of the file. Its logs tell the name of what was deleted, too."""
    secret = secrets.token_hex(12)

    def holders():
        return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]

    with open_store(url, mode="a") as store:
        store.put(some_blocks(300, "kept"))
        store.put(some_blocks(1, secret))
        store.note(secret, title=secret)
        store.compact()
        assert holders()
        store.delete(secret)
        assert holders()
        store.compact()
        assert not holders()
        store.note(secret, title=secret)  # nothing but a note
        store.delete(secret)
        store.compact()
        assert not holders()
        assert store.stats()["blocks"] == 300


def test_keys_whose_blocks_were_not_written_are_never_found(url, monkeypatch):
    """As if the disk was full, or the process killed, between the two."""
    with open_store(url, mode="a") as store:
        store.put(some_blocks(2))
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(store, "_blocks", Full(store._blocks))
                with pytest.raises(StoreError, match="disk full"):
                    store.put(some_blocks(3, keys=np.full((1, 8), 9)))
            assert store._keys.count_rows("block >= 2") == 3
        assert store.pin() == 1
    with open_store(url, mode="a") as store:
        assert store.put(some_blocks(1)) == [2]
        assert store.search(0, np.ones((1, 8), np.float32), 1, generation=2).score < 72


class Full:
    """A table on a full disk."""

    def __init__(self, table):
        self._table = table

    def __getattr__(self, name):
        return getattr(self._table, name)

    def add(self, rows):
        raise OSError("disk full")


def test_an_object_storage_has_no_lock_but_a_second_writer_is_found_out(folder):
    url = f"lancedb+file://{folder}"  # which LanceDB reads by the code that reads a bucket
    with open_store(url, mode="a") as first:
        first.put(some_blocks(2))
        first.put(some_blocks(1, "b"))
        first.delete("b")
        first.compact()
        with open_store(url, mode="a") as second:
            assert second.put(some_blocks(1)) == [3]
        for change in (lambda: first.put(some_blocks(1)), lambda: first.delete("a"), first.compact):
            with pytest.raises(StoreError, match="written to by another process"):
                change()
    with open_store(url) as store:
        assert [block.id for block in store.scan()] == [0, 1, 3]
        assert store.search(0, np.ones((1, 8), np.float32), 4, generation=store.pin()).id[0, 3] == -1
        assert store.stats()["bytes"] > 1000
    assert not (folder / "writer.lock").exists()


def test_ties_go_to_the_newer_however_many_there_are(url):
    blocks = some_blocks(50, keys=np.ones((3, 8)))
    with open_store(url, mode="a") as store:
        store.put(blocks)
        found = store.search(0, np.ones((2, 8), np.float32), 4, generation=49)
        assert found.id.tolist() == [[49, 48, 47, 46]] * 2
        found = store.search(0, np.ones((1, 8), np.float32), 60, generation=30)
        assert found.id[0].tolist() == [*range(30, -1, -1), *[-1] * 29]


def test_files_of_many_puts_are_merged(url, monkeypatch):
    monkeypatch.setattr(lancedb, "PUTS", 4)
    blocks = some_blocks(24)
    with open_store(url, mode="a") as store:
        for block in blocks:
            store.put([block])
        assert store._keys.stats()["fragment_stats"]["num_fragments"] < 8
        assert [block.start for block in store.scan()] == [*range(24)]
        query = np.ones((1, 8), np.float32)
        keys = np.concatenate([block.keys for block in blocks])
        expected = rank_blocks(keys, np.arange(24).repeat(2), query, 5)
        assert store.search(0, query, 5, generation=23).id.tolist() == expected.id.tolist()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("lancedb://", "no URL of a store: expected lancedb://PATH"),
        ("lancedb+nope://bucket/x", "the store nope://bucket/x: .*No object store provider"),
        ("lancedb:///proc/nowhere/x", "the store /proc/nowhere/x"),
    ],
)
def test_wrong_urls(url, told):
    with pytest.raises(StoreError, match=told) as caught:
        open_store(url, mode="a")
    assert "\n" not in str(caught.value)
    assert ".rs" not in str(caught.value)


def test_an_engine_is_not_chosen_twice():
    with pytest.raises(StoreError, match="engine='lmdb' is for a folder"):
        open_store("lancedb:///x", engine="lmdb")
    with pytest.raises(StoreError, match=r"no store can be opened by postgre://; did you mean 'postgresql'"):
        open_store("postgre://x")


def test_a_store_of_a_later_format(url):
    with open_store(url, mode="a") as store:
        store._tell(format=7)
    for mode in "ra":
        with pytest.raises(StoreError, match="has format 7, this bmojo reads up to 1; update bmojo"):
            open_store(url, mode=mode)


def test_damaged_files_are_told_in_one_line(folder, url):
    with open_store(url, mode="a") as store:
        store.put(some_blocks(2))
    (path,) = (folder / "blocks.lance" / "data").glob("*.lance")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match=r"the store .*: .*range") as caught, open_store(url) as store:
        store.get([0])
    assert "\n" not in str(caught.value)
    at = content.index(b"bmjB") + 200
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with open_store(url) as store, pytest.raises(StoreError, match="checksum"):
        store.get([0, 1])


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_lancedb import open_store, some_blocks
with open_store(sys.argv[1], mode="a") as store:
    while True:
        print(store.put(some_blocks(3))[-1], flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_acknowledged(url):
    last = -1
    for number in (3, 40, 90):  # puts until it is killed, the last while files are merged
        command = [sys.executable, "-c", WRITER, url, os.path.dirname(__file__)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(number):
                last = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            last = int((["", *writer.stdout.read().split()])[-1] or last)
        with open_store(url, mode="a") as store:
            assert store.pin() >= last
            ids = [block.id for block in store.scan()]
            assert ids == [*range(store.pin() + 1)]
            found = store.search(0, np.ones((1, 8), np.float32), len(ids) + 9, generation=store.pin())
            assert set(found.id[0].tolist()) == {-1, *ids}
