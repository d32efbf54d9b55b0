"""Stores in a folder: processes that share one, what is left of what was forgotten, and how blocks are found fast."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import faiss
import numpy as np
import pytest
from test_engine_conformance import DIM, ask, block, blocks, definition, published, same_found

from bmojo.errors import BMojoError, MissingPackageError, StoreError
from bmojo.memory.engines import index, open_store
from bmojo.memory.engines.verify import verify
from bmojo.memory.store import Store

LOCAL = ["lmdb", "sqlite"]
SECRET = "the-s3cret-source"


@pytest.fixture(params=LOCAL)
def engine(request):
    return request.param


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    """A process that runs `code` with the helpers of these tests."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    head = "import sys, time, numpy as np\nfrom bmojo.memory.engines import open_store\n"
    head += "from test_engine_conformance import *\nfolder = sys.argv[1]\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def ended(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    return out


def test_opening(tmp_path, engine):
    with pytest.raises(StoreError, match="no store of blocks"):
        open_store(tmp_path / "none")
    with open_store(tmp_path, engine=engine, mode="a", meta={"x": 1}) as store:
        assert store.stats()["engine"] == engine
    other = "sqlite" if engine == "lmdb" else "lmdb"
    for wrong, told in [
        ({"engine": other}, f"engine {engine}, not {other}"),
        ({"engine": "lmbd"}, "did you mean 'lmdb'"),
        ({"mode": "w"}, "'r' or 'a'"),
        ({"sync": "blocks"}, "did you mean 'block'"),
        ({"meta": {"x": 2}}, "x: the store has 1, asked for 2"),
    ]:
        with pytest.raises(StoreError, match=told):
            open_store(tmp_path, **wrong)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.put([block(np.random.default_rng(0))])


def test_without_lmdb_new_stores_are_kept_in_sqlite(tmp_path, monkeypatch):
    open_store(tmp_path / "old", engine="lmdb", mode="a").close()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingPackageError, match=r"bmojo\[memory\]"):
        open_store(tmp_path / "old")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="lmdb isn't installed"):
        store = open_store(tmp_path / "new", mode="a")
    with store:
        assert store.stats()["engine"] == "sqlite"


# several processes


def test_a_second_writer_is_told_who_writes(tmp_path, engine):
    with open_store(tmp_path, engine=engine, mode="a"):
        process = python("open_store(folder, mode='a')", tmp_path)
        err = process.communicate(timeout=60)[1]
        assert f"is being written by process {os.getpid()}" in err


def test_a_writer_that_dies_leaves_no_lock(tmp_path, engine):
    code = "store = open_store(folder, mode='a', engine=sys.argv[2]); print('open', flush=True); time.sleep(60)"
    process = python(code, tmp_path, engine)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match=f"process {process.pid}"):
        open_store(tmp_path, mode="a")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    open_store(tmp_path, mode="a").close()


def test_readers_follow_a_writer_in_another_process(tmp_path, engine):
    """Whatever they are told at a generation stays true, but for what is deleted."""
    reader = """
with open_store(folder, publish=0) as store:
    print("open", flush=True)
    seen = {}
    end = time.monotonic() + 30
    rng = np.random.default_rng(1)
    while time.monotonic() < end:
        generation = store.pin()
        for g, (queries, ids) in [*seen.items()][-3:]:
            found = store.search(0, queries, 5, generation=g).id
            if not set(store.sources()) & {"gone"}:
                ids = np.array(ids)
            assert (found == ids).all(), (g, found, ids)
        if generation >= 0:
            queries = ask(rng, 2)
            found = store.search(0, queries, 5, generation=generation).id
            seen[generation] = queries, found
            store.get([int(i) for i in found.ravel() if i >= 0])
        if generation == 119:
            break
    assert generation == 119
    print(len(seen))
"""
    rng = np.random.default_rng(0)
    with open_store(tmp_path, engine=engine, mode="a", publish=0) as store:
        readers = [python(reader, tmp_path) for _ in range(2)]
        for process in readers:
            assert process.stdout.readline() == "open\n"
        for number, some in enumerate(np.array_split(np.arange(120), 40)):
            store.put(blocks(rng, len(some)))
            if number == 20:
                store.compact()
            time.sleep(0.005)
        assert all(int(ended(process)) > 1 for process in readers)


def test_a_deletion_is_seen_by_another_process_at_its_next_search(tmp_path, engine):
    code = """
with open_store(folder) as store:
    for line in sys.stdin:
        found = store.search(0, np.ones((1, DIM), np.float32), 9, generation=1).id[0].tolist()
        print(found[:2], [b.id for b in store.scan()], sorted(store.sources()), store.stats()["deleted"], flush=True)
"""
    rng = np.random.default_rng(0)
    with open_store(tmp_path, engine=engine, mode="a") as store:
        store.put([block(rng, "a", keys=1), block(rng, "b", keys=1)])
        reader = python(code, tmp_path, stdin=subprocess.PIPE)

        def look():
            reader.stdin.write("\n")
            reader.stdin.flush()
            return reader.stdout.readline().strip()

        assert look().endswith("[0, 1] ['a', 'b'] 0")
        store.delete("b")
        assert look() == "[0, -1] [0] ['a'] 1"
        store.compact()
        assert look() == "[0, -1] [0] ['a'] 0"
        store.put([block(rng, "b", keys=1)])
        assert look() == "[0, -1] [0, 2] ['a', 'b'] 0"
        ended(reader)


def test_a_store_may_be_verified_while_it_is_written(tmp_path, engine):
    rng, done = np.random.default_rng(0), threading.Event()

    def write(store):
        while not done.is_set():
            store.put(blocks(rng, 3))

    with open_store(tmp_path, engine=engine, mode="a") as store:
        writer = threading.Thread(target=write, args=(store,))
        writer.start()
        try:
            found = [verify(tmp_path) for _ in range(3)]
        finally:
            done.set()
            writer.join()
    assert [one.problems for one in found] == [[]] * 3
    assert found[0].blocks < found[2].blocks


def test_what_others_put_is_published_within_the_interval(tmp_path, engine):
    with (
        open_store(tmp_path, engine=engine, mode="a") as store,
        open_store(tmp_path, publish=0.2) as reader,
    ):
        assert reader.pin() == -1
        store.put([block(np.random.default_rng(0))])
        began = time.monotonic()
        assert reader.pin() == -1
        published(reader, 0)
        assert time.monotonic() - began < 2


def test_a_stream_goes_on_when_another_process_deletes_what_it_found(tmp_path, engine):
    rng = np.random.default_rng(0)
    with open_store(tmp_path, engine=engine, mode="a") as writer, open_store(tmp_path) as reader:
        writer.put([block(rng, "a"), block(rng, "b")])
        store = Store(reader)
        found = store.search(0, np.ones((1, 1, DIM), np.float32), 2, reader.pin())
        writer.delete("b")
        assert {number: store.get(number) is None for _, number in found[0]} == {0: False, 1: True}


# forgetting


def traces(folder, *secrets: bytes) -> dict[str, list[bytes]]:
    """The files that any of these bytes are in."""
    found = {path.name: [s for s in secrets if s in path.read_bytes()] for path in folder.iterdir()}
    return {name: hits for name, hits in found.items() if hits}


def test_what_was_forgotten_is_in_no_file_once_compacted(tmp_path, engine):
    rng = np.random.default_rng(0)
    tokens = rng.integers(10**6, 10**9, 300, dtype=np.int32)
    secret = block(rng, SECRET, n=300, tokens=tokens)
    secrets = SECRET.encode(), tokens[:8].tobytes(), tokens[-8:].tobytes(), secret.v[150].tobytes(), b"n0te"
    with open_store(tmp_path, engine=engine, mode="a") as store:
        store.put([block(rng, "a"), secret, block(rng, SECRET, tokens=tokens[:5]), *blocks(rng, 20)])
        store.note(SECRET, path="n0te")
        store.note("a", hash="kept")
        assert traces(tmp_path, *secrets)
        store.delete(SECRET)
        assert traces(tmp_path, *secrets)
        store.compact()
        assert traces(tmp_path, *secrets) == {}
        left = {b.id for b in store.scan()}
        assert len(left) == 21
        store.compact()
    assert traces(tmp_path, *secrets) == {}
    assert traces(tmp_path, b"kept")
    with open_store(tmp_path) as store:
        assert {b.id for b in store.scan()} == left
    logs = {path.name for path in tmp_path.iterdir()}
    assert logs - {f"log-3.{engine}-lock"} == {"meta.json", "writer.lock", f"log-3.{engine}"}


def test_compaction_gives_room_back(tmp_path, engine):
    rng = np.random.default_rng(0)
    with open_store(tmp_path, engine=engine, mode="a") as store:
        store.put([block(rng, "a", n=64), *(block(rng, "b", n=64) for _ in range(300))])
        before = store.stats()["bytes"]
        store.delete("b")
        assert store.stats()["deleted"] == 300
        store.compact()
        assert store.stats()["deleted"] == 0
        assert store.stats()["bytes"] < before / 3


def test_what_goes_on_over_a_compaction_is_not_disturbed(tmp_path, engine, few_are_many):
    """A scan goes on with the old log, searches with the index, from which what was forgotten is gone."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    stored = clustered(rng, 300)
    with (
        open_store(tmp_path, engine=engine, mode="a") as store,
        open_store(tmp_path, publish=0) as reader,
    ):
        store.put(stored)
        scan = reader.scan()
        assert next(scan).id == 0
        before = ids(reader, queries)
        kept = np.array([b.source != "b" for b in stored])
        store.delete("b")
        store.compact()
        now = ids(reader, queries, 300)  # it learns of both at once
        found = set(now.ravel().tolist()) - {-1}
        assert {stored[number].source for number in found} == {"a", "c"}
        reader.get(sorted(found))
        for row, (old, new) in enumerate(zip(before, now, strict=True)):
            old = old[kept[old]]
            assert (new[: len(old)] == old).all(), row
        assert len(list(scan)) == 299 - (~kept)[1:].sum()


def test_compaction_that_died_is_cleaned_up_after(tmp_path, engine):
    """Between any two of its steps: the new log half written, or written and not taken, or the old one left."""
    rng = np.random.default_rng(0)
    with open_store(tmp_path, engine=engine, mode="a") as store:
        store.put([block(rng, "a"), block(rng, SECRET)])
        store.delete(SECRET)
    old = (tmp_path / f"log-1.{engine}").read_bytes()
    for name, content in [(f"log-2.{engine}", b"half"), (f"log-2.{engine}", old), (f"log-2.{engine}-lock", b"")]:
        (tmp_path / name).write_bytes(content)
        with open_store(tmp_path, mode="a") as store:
            assert [b.id for b in store.scan()] == [0]
        assert not (tmp_path / name).exists()
    with open_store(tmp_path, mode="a") as store:
        store.compact()
    (tmp_path / f"log-1.{engine}").write_bytes(old)
    with open_store(tmp_path, mode="a"):
        pass
    assert traces(tmp_path, SECRET.encode()) == {}


# the index


@pytest.fixture
def few_are_many(monkeypatch):
    for name, value in {"PART": 64, "MANY": 256}.items():
        monkeypatch.setattr(index, name, value)


@pytest.fixture(params=["faiss", "numpy"])
def searcher(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, "faiss", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "faiss isn't installed")
            yield
    else:
        yield


@pytest.mark.parametrize("seed", range(3))
def test_flat_parts_find_what_the_definition_does(searcher, few_are_many, seed):
    rng = np.random.default_rng(seed)
    stored = dict(enumerate(blocks(rng, 90)))
    found_in = index.Index(DIM)
    source = {name: number for number, name in enumerate("abc")}

    def add(some):
        each = [len(stored[i].keys) for i in some]
        numbers = np.array([source[stored[i].source] for i in some], np.int32)
        keys = np.concatenate([stored[i].keys for i in some])
        found_in.add(keys, np.repeat(np.array(some, np.int64), each), np.repeat(numbers, each))

    def same(generation, after):
        queries = ask(rng)
        layers = {i: dataclasses.replace(b, layer=0) for i, b in stored.items()}
        found = found_in.search(queries, 7, generation=generation, after=after)
        same_found(found, definition(layers, 0, queries, 7, generation, after))

    for some in np.array_split(np.arange(90), 5):
        add(some.tolist())
    for generation, after in [(89, -1), (40, -1), (89, 30), (41, 37), (3, 3)]:
        same(generation, after)
    found_in.drop([1])
    stored = {i: b for i, b in stored.items() if b.source != "b"}
    for generation, after in [(89, -1), (40, 20)]:
        same(generation, after)


def test_without_faiss_that_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.warns(UserWarning, match=r"search is slower; pip install 'bmojo\[memory\]'"):
        index.Index(DIM)


def clustered(rng, count):
    return [dataclasses.replace(b, layer=0) for b in blocks(rng, count, dim=16, whole=False, keys=4)]


def ids(store, queries, count=10):
    return store.search(0, queries, count, generation=store.pin()).id


def test_many_keys_are_inverted_kept_and_taken_up_again(tmp_path, engine, few_are_many, monkeypatch):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    stored = dict(enumerate(clustered(rng, 300)))
    file = tmp_path / "index-1-0.faiss"
    with open_store(tmp_path, engine=engine, mode="a", publish=0) as store:
        store.put([*stored.values()])
        first = ids(store, queries)
        assert file.exists()
        exact = definition(stored, 0, queries, 10, 299).id
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(first, exact, strict=True)]) > 0.9
        for generation, after in [(150, -1), (299, 250), (20, 10)]:
            some = store.search(0, queries, 10, generation=generation, after=after).id
            assert ((some == -1) | ((some > after) & (some <= generation))).all()
        more = clustered(rng, 40)
        store.put(more)
        assert ids(store, queries).max() > 299
        assert (store.search(0, queries, 10, generation=299).id == first).all()
    monkeypatch.setattr(index.InvertedPart, "train", None)  # it is not trained again
    with open_store(tmp_path, publish=0) as store:
        assert (store.search(0, queries, 10, generation=299).id == first).mean() > 0.9
        found = ids(store, queries, 340)
    hidden = {number for number, b in (stored | dict(enumerate(more, 300))).items() if b.source == "b"}
    assert hidden & set(found.ravel().tolist())
    with open_store(tmp_path, mode="a", publish=0) as store:
        ids(store, queries)
        store.delete("b")
        assert not hidden & set(ids(store, queries, 340).ravel().tolist())
    with open_store(tmp_path, publish=0) as store:
        assert not hidden & set(ids(store, queries, 340).ravel().tolist())


@pytest.mark.parametrize("damage", ["cut", "changed", "facts", "foreign"])
def test_a_damaged_index_is_made_again(tmp_path, engine, few_are_many, damage):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    with open_store(tmp_path, engine=engine, mode="a", publish=0) as store:
        store.put(clustered(rng, 200))
        before = ids(store, queries)
    file, facts = tmp_path / "index-1-0.faiss", tmp_path / "index-1-0.npz"
    if damage == "cut":
        os.truncate(file, 1000)
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "facts":
        os.truncate(facts, 100)
    else:
        with np.load(facts) as old:
            np.savez(facts, **{**old, "owner": old["owner"] + 10**6})
    with open_store(tmp_path, publish=0) as store, pytest.warns(UserWarning, match=r"index-1-0\.faiss is damaged"):
        assert (ids(store, queries) == before).all()
    with open_store(tmp_path, publish=0) as store:
        assert (ids(store, queries) == before).all()


def test_an_outgrown_index_is_trained_again(tmp_path, engine, few_are_many):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    with open_store(tmp_path, engine=engine, mode="a", publish=0) as store:
        store.put(clustered(rng, 100))
        ids(store, queries)
        store.put(clustered(rng, 400))
    before = (tmp_path / "index-1-0.faiss").stat().st_size
    with open_store(tmp_path, publish=0) as store:
        ids(store, queries)
        assert store._indexes[0]._parts[0].trained == 2000
    assert (tmp_path / "index-1-0.faiss").stat().st_size > 3 * before


def test_the_disk_being_full_is_told_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for it."""
    code = """
import resource, signal
from bmojo.errors import BMojoError
rng = np.random.default_rng(0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for engine in ("lmdb", "sqlite"):
    store = open_store(folder + engine, mode="a", engine=engine, publish=0)
    store.put([block(rng, n=64)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    put = 1
    try:
        while put < 10**4:
            store.put([block(rng, n=64)])
            put += 1
    except BMojoError as error:
        assert engine in str(error), error
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert len(list(store.scan())) == put < 10**4
    assert store.put([block(rng)]) == [put]
    store.close()
    with open_store(folder + engine) as store:
        assert len(list(store.scan())) == put + 1
"""
    ended(python(code, tmp_path / "store"))
    assert issubclass(StoreError, BMojoError)


@pytest.mark.slow
def test_a_query_of_100_000_keys_takes_at_most_5_ms():
    """On one thread, of 128 dimensions; the bar of issue 6."""
    rng, threads = np.random.default_rng(0), faiss.omp_get_max_threads()
    found_in = index.Index(128)
    keys, each = rng.standard_normal((100_000, 128)).astype(np.float16), 4
    found_in.add(keys, np.arange(len(keys)) // each, np.zeros(len(keys), np.int32))
    times = []
    faiss.omp_set_num_threads(1)
    try:
        for query in rng.standard_normal((51, 1, 128)).astype(np.float32):
            began = time.perf_counter()
            found_in.search(query, 8, generation=len(keys))
            times.append(time.perf_counter() - began)
    finally:
        faiss.omp_set_num_threads(threads)
    assert np.median(times) <= 5e-3


@pytest.mark.slow
def test_a_store_of_10_million_tokens_takes_less_than_300_mb_of_memory(tmp_path):
    """Index, files that are mapped and all: 160,000 blocks of 4 keys of 128 dimensions, whose values are short here."""
    code = """
import faiss, psutil
before = psutil.Process().memory_info().rss
rng, most = np.random.default_rng(1), 0
with open_store(folder) as store:
    for _ in range(500):
        found = store.search(0, rng.standard_normal((4, 128), np.float32), 8, generation=store.pin())
        store.get(rng.integers(0, 160_000, 32).tolist())
        most = max(most, psutil.Process().memory_info().rss)
    assert store._indexes[0].keys == 640_000
print((most - before) / 1e6)
"""
    rng = np.random.default_rng(0)
    with open_store(tmp_path, mode="a", sync="close") as store:
        for _ in range(160):
            keys = rng.standard_normal((1000, 4, 128), np.float32).astype(np.float16)
            one = block(rng, n=24)
            store.put([dataclasses.replace(one, keys=some) for some in keys])
    for _ in range(2):  # the index is made, and then read
        assert float(ended(python(code, tmp_path))) < 300
