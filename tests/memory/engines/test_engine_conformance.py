"""What every engine must do, as MemoryEngine and `rank_blocks` define it; conftest.py says how to add an engine."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from bmojo.errors import StoreError
from bmojo.memory.engines import Block
from bmojo.memory.engines.engine import MemoryEngine, rank_blocks

DIM = 6
EPS = 2.0**-10  # rounding one factor of a product to float16 is off by up to 2^-11 of it, rounding both twice that


def block(rng, source="a", layer=0, n=5, keys=2, dim=DIM, dtype=np.float16, whole=True, **fields) -> Block:
    """Random; whole: keys of small integers, whose products are exact and often equal."""
    draw = rng.integers(-2, 3, (keys, dim)) if whole else rng.standard_normal((keys, dim))
    k, v = rng.standard_normal((2, n, 2, 4)).astype(dtype)
    made = Block(
        layer, source, 64, rng.integers(0, 9, n, dtype=np.int32), k, v, draw.astype(dtype),
        rng.random(n, dtype=np.float32), fingerprint="f00d",
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


def blocks(rng, count, **fields) -> list[Block]:
    """Of three layers and sources, of 1 to 64 tokens, with one to four keys each."""

    def one() -> Block:
        source, layer = str(rng.choice(["a", "b", "c"])), int(rng.choice([0, 3, 7]))
        return block(rng, source, layer, **{"n": int(rng.integers(1, 65)), "keys": int(rng.integers(1, 5))} | fields)

    return [one() for _ in range(count)]


def published(engine, number: int) -> int:
    """The generation that is published once it has reached block `number`."""
    end = time.monotonic() + 10
    while engine.pin() < number:
        assert time.monotonic() < end, f"block {number} was not published in 10 s"
        time.sleep(0.002)
    return engine.pin()


def definition(stored: dict[int, Block], layer, queries, count, generation, after=-1):
    mine = {i: b.keys for i, b in stored.items() if b.layer == layer and after < i <= generation}
    keys = np.concatenate([*mine.values(), np.zeros((0, queries.shape[1]))])
    return rank_blocks(keys, np.repeat(np.array([*mine], np.int64), [len(k) for k in mine.values()]), queries, count)


def same_found(found, expected):
    assert found.score.dtype == np.float32
    assert found.id.dtype == np.int64
    np.testing.assert_array_equal(found.id, expected.id)
    np.testing.assert_array_equal(found.score, expected.score)


def same_block(got: Block, put: Block, number: int):
    for field in dataclasses.fields(Block):
        a, b = getattr(got, field.name), getattr(put, field.name)
        if isinstance(b, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        elif field.name != "id":
            assert a == b, field.name
    assert got.id == number


def ask(rng, n=3, dim=DIM):
    return rng.integers(-2, 3, (n, dim)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(6)


# ids, and what comes back


def test_an_empty_store_has_nothing(store, rng):
    assert store.pin() == -1
    assert store.put([]) == []
    assert store.get([]) == []
    assert list(store.scan()) == []
    assert store.sources() == {}
    found = store.search(0, ask(rng), 4, generation=-1)
    assert (found.id == -1).all()
    assert (found.score == -np.inf).all()
    assert found.id.shape == found.score.shape == (3, 4)
    store.compact()
    assert {name: store.stats()[name] for name in ("blocks", "tokens", "deleted", "sources", "generation")} == {
        "blocks": 0, "tokens": 0, "deleted": 0, "sources": 0, "generation": -1
    }  # fmt: skip


def test_ids_ascend(store, rng):
    ids = [number for size in (1, 4, 2) for number in store.put(blocks(rng, size))]
    assert ids == list(range(7))
    assert published(store, 6) == 6


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_come_back_to_the_bit(store, rng, dtype):
    odd = np.array([[np.inf, -np.inf, np.nan, -0.0], [6e-8, 65504, 1, -1]], dtype)
    k = np.stack([odd, odd[::-1]])
    put = [*blocks(rng, 4, dtype=dtype), block(rng, n=2, dtype=dtype, k=k, v=k.swapaxes(0, 1))]
    for number, stored in zip(ids := store.put(put), store.get(ids), strict=True):
        same_block(stored, put[number], number)


def test_get_keeps_the_order_and_duplicates(store, rng):
    put = blocks(rng, 5)
    ids = store.put(put)
    for number, stored in zip(asked := [3, 0, 3, 4], store.get([ids[i] for i in asked]), strict=True):
        same_block(stored, put[number], ids[number])


def test_get_tells_of_blocks_that_are_not_there(store, rng):
    store.put([block(rng, source) for source in "aab"])
    store.delete("b")
    for missing in (2, 3, -1, 10**12):
        with pytest.raises(StoreError, match=rf"no blocks \[{missing}\]"):
            store.get([0, missing])
    store.compact()
    with pytest.raises(StoreError, match=r"no blocks \[2\]"):
        store.get([2])


def test_what_is_put_is_a_copy(store, rng):
    put = block(rng)
    kept = dataclasses.replace(put, k=put.k.copy(), keys=put.keys.copy())
    store.put([put])
    put.k[:], put.keys[:] = 1, 1
    same_block(store.get([0])[0], kept, 0)


@pytest.mark.parametrize(
    "source",
    [
        "naïve/日本語 🦆.txt",
        'it\'s "quoted"\\ %s {x} $1; --',
        "a\nb\tc",
        " ",
        "x" * 3000,
        "e\u0301",
        "\u00e9",
        "\U0010ffff",
    ],
)
def test_sources_of_any_name(store, rng, source):
    store.put([block(rng, source), block(rng, "other")])
    store.note(source, hash=source)
    assert store.sources()[source] == {"blocks": 1, "tokens": 5, "hash": source}
    same_block(store.get([0])[0], dataclasses.replace(store.get([0])[0], source=source), 0)
    assert store.delete(source) == 1
    store.compact()
    assert [b.source for b in store.scan()] == ["other"]


# search


@pytest.mark.parametrize("seed", range(3))
def test_search_is_the_definition(place, seed):
    rng = np.random.default_rng(seed)
    with place() as store:
        stored = dict(enumerate(blocks(rng, 40)))
        for some in np.array_split(np.arange(40), 6):
            store.put([stored[int(i)] for i in some])
        published(store, 39)
        for layer in (0, 3, 7, 1):
            for generation, after in [(39, -1), (20, -1), (39, 17), (25, 9), (10, 9), (9, 9), (-1, -1)]:
                for count in (1, 7, 50):
                    queries = ask(rng, int(rng.integers(1, 5)))
                    found = store.search(layer, queries, count, generation=generation, after=after)
                    same_found(found, definition(stored, layer, queries, count, generation, after))
        assert store.search(0, np.zeros((0, DIM), np.float32), 2, generation=39).id.shape == (0, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_to_the_precision_of_float16(store, rng, dtype):
    stored = dict(enumerate(blocks(rng, 60, dim=64, dtype=dtype, whole=False)))
    store.put([*stored.values()])
    published(store, 59)
    queries = rng.standard_normal((5, 64)).astype(np.float32)
    found, every = store.search(3, queries, 8, generation=59), definition(stored, 3, queries, 60, 59)
    longest = max(np.linalg.norm(b.keys.astype(float), axis=1).max() for b in stored.values())
    for row, query in enumerate(queries):
        exact = dict(zip(every.id[row].tolist(), every.score[row].tolist(), strict=True))
        error = EPS * longest * np.linalg.norm(query)
        assert (abs(found.score[row] - [exact[number] for number in found.id[row].tolist()]) <= error).all()
        assert (abs(found.score[row] - every.score[row, :8]) <= error).all()  # so no better block was missed
    assert (np.diff(found.score) <= 0).all()


def test_ties_go_to_the_newer(store, rng):
    same = block(rng, keys=3)
    store.put([same, block(rng, layer=1), same, same])
    found = store.search(0, np.ones((1, DIM), np.float32), 2, generation=published(store, 3))
    assert found.id.tolist() == [[3, 2]]


def test_tiny_and_huge_numbers(store, rng):
    keys = np.array([[0] * DIM, [6e-8] * DIM, [65504] * DIM, [-65504] * DIM], np.float16)
    store.put(
        [block(rng, keys=1, layer=0)] + [dataclasses.replace(block(rng), layer=1, keys=key[None]) for key in keys]
    )
    queries = np.array([[1e-30] * DIM, [65504] * DIM, [-0.0] * DIM], np.float32)
    found = store.search(1, queries, 4, generation=published(store, 4))
    assert found.id[1].tolist() == [3, 2, 1, 4]
    np.testing.assert_allclose(found.score[1], DIM * 65504 * keys[[2, 1, 0, 3], 0].astype(np.float32), rtol=EPS)
    assert (abs(found.score[[0, 2]]) < 1e-20).all()
    assert found.id[2].tolist() == [4, 3, 2, 1]


def test_later_blocks_do_not_change_a_pinned_search(store, rng):
    stored = dict(enumerate(blocks(rng, 12)))
    store.put([*stored.values()])
    queries, generation = ask(rng), published(store, 11)
    before = store.search(3, queries, 9, generation=generation)
    for _ in range(4):
        last = store.put(blocks(rng, 10))[-1]
    assert published(store, last) == last
    same_found(store.search(3, queries, 9, generation=generation), before)


# deletion


def test_deleted_is_hidden_at_once_from_every_generation(store, rng):
    stored = dict(enumerate(blocks(rng, 30)))
    store.put([*stored.values()])
    queries, generation = ask(rng), published(store, 29)
    gone = {i for i, b in stored.items() if b.source == "b"}
    assert store.delete("b") == len(gone)
    left = {i: b for i, b in stored.items() if i not in gone}
    for pinned in (generation, 15):
        for layer in (0, 3, 7):
            same_found(
                store.search(layer, queries, 30, generation=pinned), definition(left, layer, queries, 30, pinned)
            )
    assert [b.id for b in store.scan()] == [*left]
    assert set(store.sources()) == {"a", "c"}
    assert store.pin() == 29


def test_ids_are_never_used_again(store, rng):
    store.put([block(rng, "a"), block(rng, "b"), block(rng, "b")])
    store.delete("b")
    assert store.put([block(rng, "b")]) == [3]
    store.delete("b")
    store.compact()
    assert store.put([block(rng, "c")]) == [4]
    assert published(store, 4) == 4


def test_a_deleted_source_may_be_put_again(store, rng):
    store.put([block(rng, "a"), block(rng, "a", keys=3)])
    store.delete("a")
    again = block(rng, "a")
    assert store.put([again]) == [2]
    for _ in range(2):
        queries = ask(rng)
        found = store.search(0, queries, 3, generation=published(store, 2))
        same_found(found, definition({2: again}, 0, queries, 3, 2))
        assert store.sources() == {"a": {"blocks": 1, "tokens": 5}}
        assert [b.id for b in store.scan()] == [2]
        store.compact()


def test_compact_changes_nothing_but_what_was_deleted(store, rng):
    stored = dict(enumerate(blocks(rng, 30)))
    store.put([*stored.values()])
    store.note("a", hash="1")
    queries, generation = ask(rng), published(store, 29)
    store.delete("c")
    before = store.search(0, queries, 20, generation=generation), store.sources(), [b.id for b in store.scan()]
    assert store.stats()["deleted"] in (0, sum(b.source == "c" for b in stored.values()))  # or removed at once
    for _ in range(2):
        store.compact()
        same_found(store.search(0, queries, 20, generation=generation), before[0])
        assert (store.sources(), [b.id for b in store.scan()]) == before[1:]
        assert store.stats()["deleted"] == 0
        assert store.pin() == generation
    for number in before[2]:
        same_block(store.get([number])[0], stored[number], number)


def test_all_may_be_deleted(store, rng):
    store.put([block(rng, "a"), block(rng, "b")])
    store.delete("a")
    store.delete("b")
    for _ in range(2):
        assert store.search(0, ask(rng), 2, generation=published(store, 1)).id.tolist() == [[-1, -1]] * 3
        assert list(store.scan()) == []
        store.compact()
    assert store.put([block(rng)]) == [2]


# sources and figures


def test_notes_are_kept_replaced_and_deleted_with_their_source(store, rng):
    store.put([block(rng, "a", n=3), block(rng, "a", n=4)])
    store.note("a", hash="1", size=7, parts=[1, {"x": None}])
    store.note("a", hash="2")
    store.note("b", empty=True)
    assert store.sources() == {
        "a": {"blocks": 2, "tokens": 7, "hash": "2", "size": 7, "parts": [1, {"x": None}]},
        "b": {"blocks": 0, "tokens": 0, "empty": True},
    }
    assert store.stats()["sources"] == 2
    assert (store.delete("a"), store.delete("b")) == (2, 0)
    assert store.sources() == {}
    store.put([block(rng, "a", n=3)])
    assert store.sources() == {"a": {"blocks": 1, "tokens": 3}}


def test_stats(store, rng):
    store.put([block(rng, "a", n=3), block(rng, "b", n=4), block(rng, "b", n=64)])
    store.delete("a")
    published(store, 2)
    stats = store.stats()
    assert {name: stats[name] for name in ("blocks", "tokens", "sources", "generation")} == {
        "blocks": 2, "tokens": 68, "sources": 1, "generation": 2
    }  # fmt: skip
    assert stats["bytes"] >= 0
    assert isinstance(stats["engine"], str)


def test_a_scan_goes_from_the_oldest(store, rng):
    put = blocks(rng, 25)
    store.put(put[:20])
    store.put(put[20:])
    for number, stored in enumerate(store.scan()):
        same_block(stored, put[number], number)
    assert number == 24


# bad input

BAD = {
    "dim": ({"dim": DIM + 1}, rf"dimension {DIM + 1}, this store has {DIM}"),
    "no keys": ({"keys": 0}, "at least one"),
    "keys 1-D": ({"keys": np.ones(DIM, np.float16)}, "at least one"),
    "nan": ({"keys": np.full((1, DIM), np.nan, np.float16)}, "not finite"),
    "too large": ({"dtype": np.float32, "keys": np.full((1, DIM), 1e5, np.float32)}, "not finite"),
    "dtype": ({"dtype": np.float64}, "float64"),
    "mixed": ({"keys": np.ones((1, DIM), np.float32)}, "float16, float16, float32"),
    "lengths": ({"score": np.zeros(4, np.float32)}, "score"),
    "no tokens": ({"n": 0}, "tokens"),
    "text": ({"layer": "0"}, "layer"),
    "negative": ({"layer": -1}, "layer"),
    "numpy": ({"layer": np.int64(1)}, "layer"),
    "nameless": ({"source": ""}, "source"),
    "no text": ({"source": 7}, "source"),
    "nul": ({"source": "a\0b"}, "source"),
    "no unicode": ({"source": "a\udcff"}, "source"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_blocks_are_refused_and_nothing_is_stored(store, rng, case):
    fields, told = BAD[case]
    drawn = {name: value for name, value in fields.items() if not isinstance(value, np.ndarray)}
    fixed = {name: value for name, value in fields.items() if name not in drawn}
    store.put([block(rng)])
    with pytest.raises(StoreError, match=told):
        store.put([block(rng), block(rng, **drawn) if not fixed else dataclasses.replace(block(rng, **drawn), **fixed)])
    assert [b.id for b in store.scan()] == [0]
    assert store.put([block(rng)]) == [1]


def test_bad_searches_are_refused(store, rng):
    store.put([block(rng)])
    for layer, queries, count in [
        ("0", ask(rng), 1),
        (-1, ask(rng), 1),
        (0, ask(rng, dim=DIM - 1), 1),
        (0, ask(rng)[0], 1),
        (0, ask(rng), 0),
        (0, ask(rng) * np.nan, 1),
        (0, ask(rng) + 1e5, 1),
    ]:
        with pytest.raises(StoreError):
            store.search(layer, queries, count, generation=0)


def test_unknown_sources_are_refused(store, rng):
    store.put([block(rng, "report.txt")])
    with pytest.raises(StoreError, match=r"no source 'reprt.txt'; did you mean 'report.txt'"):
        store.delete("reprt.txt")
    store.delete("report.txt")
    with pytest.raises(StoreError, match="no source"):
        store.delete("report.txt")
    with pytest.raises(StoreError, match="source"):
        store.note("a\0b", x=1)


# several threads, readers and processes


def test_a_writer_and_searching_threads(store, rng):
    """What a search at a pinned generation finds does not depend on what is being written."""
    stored = dict(enumerate(blocks(rng, 80)))
    failures: list[BaseException] = []
    done = threading.Event()

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def write():
        try:
            for some in np.array_split(np.arange(80), 20):
                store.put([stored[int(i)] for i in some])
                store.note("a", upto=int(some[-1]))
        finally:
            done.set()

    def read(seed):
        own = np.random.default_rng(seed)
        while not done.is_set() and not failures:
            generation, queries, layer = store.pin(), ask(own), int(own.choice([0, 3, 7]))
            found = store.search(layer, queries, 5, generation=generation)
            same_found(found, definition(stored, layer, queries, 5, generation))
            for number in set(found.id[found.id >= 0].tolist()):
                same_block(store.get([number])[0], stored[number], number)
            store.stats(), store.sources()

    works = [write, lambda: read(1), lambda: read(2)]
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert published(store, 79) == 79
    assert [b.id for b in store.scan()] == list(range(80))


def test_threads_search_while_the_store_is_compacted(store, rng):
    stored = dict(enumerate(blocks(rng, 40)))
    store.put([*stored.values()])
    generation = published(store, 39)
    store.delete("b")
    left = {number: b for number, b in stored.items() if b.source != "b"}
    failures: list[BaseException] = []
    done = threading.Event()

    def read():
        try:
            while not done.is_set():
                queries = ask(rng)
                same_found(
                    store.search(3, queries, 6, generation=generation), definition(left, 3, queries, 6, generation)
                )
                assert [b.id for b in store.get([*left])] == [*left]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(3):
        store.compact()
        store.put([block(rng, "d")])
        store.delete("d")
    done.set()
    thread.join()
    assert not failures, failures[0]


def test_two_writing_threads_share_no_ids(store, rng):
    put, ids = blocks(rng, 4), []
    threads = [threading.Thread(target=lambda: [ids.extend(store.put(put)) for _ in range(5)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == list(range(60))


def test_a_reader_sees_what_is_published(place, rng):
    stored = dict(enumerate(blocks(rng, 12)))
    queries = ask(rng)
    with place() as store, place(mode="read") as reader:
        assert reader.pin() == -1
        store.put([*stored.values()])
        for layer in (0, 3, 7):
            found = reader.search(layer, queries, 12, generation=published(reader, 11))
            same_found(found, definition(stored, layer, queries, 12, 11))
        store.delete("b")
        end = time.monotonic() + 10
        while "b" in reader.sources():
            assert time.monotonic() < end
            time.sleep(0.002)
        left = {i: b for i, b in stored.items() if b.source != "b"}
        for _ in range(2):
            same_found(reader.search(3, queries, 12, generation=11), definition(left, 3, queries, 12, 11))
            assert [b.id for b in reader.scan()] == [*left]
            store.compact()


def test_opened_again_it_is_as_it_was(place, rng):
    meta = {"fingerprint": "f00d", "layers": [0, 3, 7], "dim": DIM}
    stored = dict(enumerate(blocks(rng, 30)))
    queries = ask(rng)
    with place(meta) as store:
        assert store.meta == meta
        store.put([*stored.values()])
        store.note("a", hash="ä")
        store.delete("c")
        sources = store.sources()
    left = {i: b for i, b in stored.items() if b.source != "c"}
    for compacted in (False, True):
        with place() as store:
            assert store.meta == meta
            assert store.pin() == 29
            assert store.sources() == sources
            for number, again in zip(left, store.scan(), strict=True):
                same_block(again, stored[number], number)
            same_found(store.search(0, queries, 9, generation=29), definition(left, 0, queries, 9, 29))
            same_found(store.search(0, queries, 9, generation=20), definition(left, 0, queries, 9, 20))
            if not compacted:
                store.compact()
    with place(meta) as store, pytest.raises(StoreError, match="dimension"):
        store.put([block(rng, dim=DIM + 1)])
    with place(meta) as store:
        assert store.put([block(rng)]) == [30]


def test_to_close_twice_does_no_harm(place, rng):
    store = place()
    store.put([block(rng)])
    store.close()
    store.close()
    with place() as store:
        assert len(list(store.scan())) == 1


def test_a_store_of_another_model_is_refused_with_the_difference(lasting):
    lasting({"fingerprint": "f00d", "window": 64}).close()
    for mode in ("write", "read"):
        with pytest.raises(StoreError, match=r"fingerprint: the store has 'f00d', asked for 'beef'"):
            lasting({"fingerprint": "beef", "window": 64}, mode)
    lasting({"window": 64, "fingerprint": "f00d"}).close()


def test_a_second_writer_is_refused_until_the_first_has_closed(lasting, rng):
    with lasting() as store:
        with pytest.raises(StoreError, match="writ"):
            lasting()
        store.put([block(rng)])
    with lasting() as store:
        assert store.put([block(rng)]) == [1]


def test_a_reader_does_not_write(lasting, rng):
    with lasting() as store:
        store.put([block(rng)])
    with lasting(mode="read") as reader:
        for change in (
            lambda: reader.put([block(rng)]),
            lambda: reader.delete("a"),
            lambda: reader.note("a", x=1),
            reader.compact,
        ):
            with pytest.raises(StoreError, match="read"):
                change()
        assert published(reader, 0) == 0
        assert reader.get([0])[0].source == "a"


def test_a_store_that_is_not_there_is_not_made_by_a_reader(lasting):
    with pytest.raises(StoreError):
        lasting(mode="read")


def test_the_definition_ranks_a_block_by_its_best_key():
    keys = np.array([[1, 0], [0, 3], [2, 0], [2, 0]], np.float16)
    found = rank_blocks(keys, np.array([0, 0, 1, 2]), np.array([[1, 0], [0, 1]], np.float32), 4)
    assert found.id.tolist() == [[2, 1, 0, -1], [0, 2, 1, -1]]
    assert found.score.tolist() == [[2, 2, 1, -np.inf], [3, 0, 0, -np.inf]]
    assert MemoryEngine().pin() == -1
