"""A store and its writer in the background: what was acknowledged is there, what goes wrong is said, and by name."""

import threading

import numpy as np
import pytest

from bmojo.errors import StoreError
from bmojo.memory.engines import Block, open_store
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.store import WAITING, Store


def block(number: int, source: str = "a") -> Block:
    rng = np.random.default_rng(number)
    k, v = rng.standard_normal((2, 4, 1, 2)).astype(np.float16)
    keys, score = rng.standard_normal((1, 2)).astype(np.float16), np.zeros(4, np.float32)
    return Block(0, source, 4 * number, np.arange(4, dtype=np.int32), k, v, keys, score)


def numbers(engine, source: str = "a") -> list[int]:
    return [block.start // 4 for block in engine.scan() if block.source == source]


class Gate(MemoryEngine):
    """Writes nothing until it is opened; fails at block `full`."""

    def __init__(self, full: int = -1) -> None:
        super().__init__()
        self.gate, self.full = threading.Event(), full

    def put(self, blocks):
        self.gate.wait()
        if any(b.start == 4 * self.full for b in blocks):
            raise StoreError("log-1.lmdb can't be written: no space left on the disk")
        return super().put(blocks)


def test_what_waits_at_the_end_is_written():
    engine, told = Gate(), {}
    store = Store(engine)
    threading.Timer(0.05, engine.gate.set).start()
    for n in range(WAITING + 100):  # more than may wait
        store.put(block(n), lambda b, number: told.update({b.start: number}))
    store.close()
    assert numbers(engine) == list(range(WAITING + 100))
    assert told == {b.start: b.id for b in engine.scan()}
    with pytest.raises(StoreError, match="the store is closed"):
        store.put(block(0), lambda b, number: None)
    store.close()
    store.flush()
    assert len(list(engine.scan())) == WAITING + 100


def test_threads_put_while_it_is_closed():
    """Each block is in the store, or its thread was told that it is not."""
    engine, put = MemoryEngine(), {source: [] for source in "abc"}
    store = Store(engine)

    def work(source: str) -> None:
        for n in range(10**6):
            try:
                store.put(block(n, source), lambda b, number: None)
            except StoreError:
                return
            put[source].append(n)

    threads = [threading.Thread(target=work, args=(source,)) for source in put]
    for thread in threads:
        thread.start()
    while min(map(len, put.values())) < 20:
        pass
    store.close()
    for thread in threads:
        thread.join(10)
    assert {source: numbers(engine, source) for source in put} == put


def test_a_full_disk_is_told_and_loses_nothing_acknowledged():
    engine, told = Gate(full=70), []
    engine.gate.set()
    store = Store(engine)
    for n in range(64):
        store.put(block(n), lambda b, number: told.append(b.start))
    store.flush()
    store.put(block(70), lambda b, number: told.append(b.start))
    for call in (store.flush, lambda: store.put(block(99), print), store.close):
        with pytest.raises(StoreError, match=r"no space left.*restore the streams"):
            call()
    assert [4 * n for n in numbers(engine)] == told
    assert len(told) >= 64


def test_what_a_stream_reads_again_is_written_once():
    engine, told = MemoryEngine(), []
    with Store(engine) as store:
        for n in (0, 1, 2, 1, 2, 3):
            store.put(block(n), lambda b, number: told.append((b.start // 4, number)))
        assert (store.end("a"), store.end("b")) == (16, 0)
        store.put(block(0, "b"), lambda b, number: None)
        store.delete("a")
        store.put(block(1), lambda b, number: told.append((b.start // 4, number)))
    assert told[:3] == [(0, 0), (1, 1), (2, 2)]
    assert all(number >= at for at, number in told[3:])
    assert (numbers(engine), numbers(engine, "b")) == ([1], [0])


def test_deleted_between_search_and_get():
    engine = MemoryEngine()
    with Store(engine) as store:
        for n in range(3):
            store.put(block(n, "ab"[n % 2]), lambda b, number: None)
        store.flush()
        [found] = store.search(0, np.ones((1, 1, 2), np.float32), 3, engine.pin())
        assert {number for _, number in found} == {0, 1, 2}
        assert store.get(0).source == "a"
        engine.delete("b")  # by another process
        assert store.get(1) is None
        assert store.get(1) is None
        assert store.delete("a") == 2
        assert store.get(0) is None
        with pytest.raises(StoreError, match="no source 'a'"):
            store.delete("a")


def test_deleted_with_what_still_waits_to_be_written():
    engine = Gate()
    with Store(engine) as store:
        for n in range(5):
            store.put(block(n), lambda b, number: None)
        threading.Timer(0.05, engine.gate.set).start()
        assert store.delete("a") == 5
        store.flush()
        assert not list(engine.scan())


def test_a_read_that_a_delete_overtakes_is_not_kept():
    engine = MemoryEngine()
    with Store(engine) as store:
        store.put(block(0), lambda b, number: None)
        store.flush()
        get = engine.get

        def late(ids):
            found = get(ids)
            store.delete("a")
            return found

        engine.get = late
        assert store.get(0) is None
        engine.get = get
        assert store.get(0) is None


def test_a_damaged_block_is_named(tmp_path):
    with open_store(tmp_path / "store", meta={}, engine="sqlite", mode="a") as engine:
        engine.put([block(n) for n in range(3)])
    path = tmp_path / "store" / "log-1.sqlite"
    content = bytearray(path.read_bytes())
    at = content.rindex(block(1).k.tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with Store(open_store(tmp_path / "store")) as store:
        assert store.get(0).start == 0
        with pytest.raises(StoreError, match=r"log-1\.sqlite: block 1: .* verify --repair"):
            store.get(1)
