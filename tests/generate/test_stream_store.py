"""Streams with a store: what they are told stays, however they are cut, left, kept, saved or forked."""

import pytest
import torch
from stream_cases import new_model
from test_stream import interrupted

from bmojo import Store, Stream
from bmojo.errors import ConfigError, StateError, StoreError
from bmojo.generate import Sampling, generate_batch
from bmojo.memory.storage import Storage, root

SIZES = {"storage_layers": (0, 1), "storage_block": 8, "storage_stride": 4, "storage_keys": 2, "storage_queries": 2}
MODEL = new_model(**SIZES).double()
for parameter in MODEL.parameters():  # attention that looks at something
    parameter.data *= 1 + (parameter.ndim == 2)
CHOICE = {"temperature": 0.9, "seed": 1}
TOKENS = torch.randint(50, (700,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def store(tmp_path):
    """With a document of another source, and published at once."""
    with Store.open(tmp_path / "store", MODEL, publish=0) as store:
        Stream(MODEL, store=store, name="book").feed(TOKENS[::-1])
        store.flush()
        yield store


@torch.no_grad()
def expected(store, ids, count):
    """`count` tokens after `ids`, by forward passes over all that came before."""
    ids, storage = list(ids), Storage(MODEL.config, store=store, sources=["naive"], write=False)
    logits, state = MODEL(torch.tensor([ids]), storage=storage)
    for _ in range(count):
        ids.append(Sampling(**CHOICE).choose(logits[0, -1], len(ids)))
        logits, state = MODEL(torch.tensor([ids[-1:]]), state, storage=storage)
    return ids[len(ids) - count :]


def test_it_is_the_loop_over_the_model(store):
    found = expected(store, TOKENS[:601], 100)
    pieces = Stream(MODEL, store=store, write=False, **CHOICE)
    for start in range(0, 601, 77):
        pieces.feed(TOKENS[start : min(601, start + 77)])
        assert pieces.state.nbytes
    assert [next(pieces.generate()) for _ in range(100)] == found
    stream = Stream(MODEL, store=store, name="mine", **CHOICE)
    assert list(stream.feed(TOKENS[:601]).generate(100)) == found
    assert found != list(Stream(MODEL, **CHOICE).feed(TOKENS[:601]).generate(100))
    store.flush()
    assert store.engine.sources()["mine"]["blocks"] == 2 * (700 // 8)


def test_left_kept_forked_and_broken_off(store):
    found = expected(store, TOKENS[:333], 90)
    stream = Stream(MODEL, store=store, name="mine", **CHOICE).feed(TOKENS[:333])
    assert list(stream.generate(30)) == found[:30]
    kept, twin = stream.snapshot(), stream.fork()
    twin.feed([1, 2, 3])
    list(twin.generate(20))
    aside = stream.fork(write=False)
    assert list(aside.generate(60)) == found[30:]
    for action in (lambda: next(stream.generate()), lambda: stream.feed(TOKENS)):
        with interrupted(MODEL, 1):
            action()
    assert list(stream.generate(30)) == found[30:60]
    stream.feed([7] * 40)
    stream.restore(kept)
    assert list(stream.generate(60)) == found[30:]
    store.flush()
    assert {root(source) for source in store.engine.sources()} == {"book", "mine"}
    assert len(store.engine.sources()) == 5  # of the feed that was broken off, too, something was handed over


def test_saved_and_gone_on_with(store, tmp_path):
    found = expected(store, TOKENS[:333], 90)
    stream = Stream(MODEL, store=store, name="mine", **CHOICE).feed(TOKENS[:333])
    assert list(stream.generate(45)) == found[:45]
    stream.save(tmp_path / "stream.safetensors")
    again = Stream.load(tmp_path / "stream.safetensors", MODEL, store=store)
    assert list(again.generate(45)) == found[45:]
    store.flush()
    assert set(store.engine.sources()) == {"book", "mine"}
    late = Stream.load(tmp_path / "stream.safetensors", MODEL, store=store)  # the store knows of a future already
    assert list(late.generate(45)) == found[45:]
    store.flush()
    assert len(store.engine.sources()) == 3
    with pytest.raises(StateError, match="the snapshot has a store, the stream has none"):
        Stream.load(tmp_path / "stream.safetensors", MODEL)
    Stream(MODEL).feed([1]).save(tmp_path / "plain.safetensors")
    with pytest.raises(StateError, match="the stream has a store, the snapshot has none"):
        Stream.load(tmp_path / "plain.safetensors", MODEL, store=store)


def test_a_name_that_the_store_has_is_another_branch_of_it(store):
    before = store.engine.sources()["book"]
    again = Stream(MODEL, store=store, name="book").feed(TOKENS)
    list(again.generate(2))
    store.flush()
    assert store.engine.sources()["book"] == before
    assert {block.source for kept in again.storage.layers.values() for block in kept.found[0]} == set(
        again.storage.sources
    )


def test_in_a_batch_as_alone(store):
    lengths = (333, 91, 200, 17)
    found = [expected(store, TOKENS[:n], 80) for n in lengths]
    streams = [Stream(MODEL, store=store, write=False, **CHOICE).feed(TOKENS[:n]) for n in lengths]
    steps = list(generate_batch(streams, 70))
    assert [list(row) for row in zip(*steps, strict=True)] == [row[:70] for row in found]
    assert [list(stream.generate(10)) for stream in streams] == [row[70:] for row in found]
    with pytest.raises(ConfigError, match="must all have the same store"):
        generate_batch([streams[0], Stream(MODEL).feed([1])])


def test_refusals(store, tmp_path):
    with pytest.raises(ConfigError, match="no layer with storage"):
        Stream(new_model(), store=store)
    other = new_model(**SIZES)
    other.embed.weight.data += 1
    with pytest.raises(StoreError, match="weights"):
        Store.open(tmp_path / "store", other, mode="r")
    with pytest.raises(StoreError, match="storage_block: the store has 8, asked for 16"):
        Store.open(tmp_path / "store", MODEL.with_settings(storage_block=16), mode="r")
    Store.open(tmp_path / "store", MODEL.with_settings(storage_stride=8, storage_blocks=2), mode="r").close()
    with pytest.raises(ConfigError, match="begins with it"):
        Stream(MODEL, store=store, state=Stream(MODEL).feed([1]).state)


def test_a_memory_alone_is_no_stream_with_a_store(store, tmp_path):
    Stream(MODEL).feed([1]).state.save(tmp_path / "memory")
    with pytest.raises(ConfigError, match="begins with it"):
        Stream.load(tmp_path / "memory", MODEL, store=store)


def test_decay_goes_with_the_stream(store, tmp_path):
    def begin(**options):
        return Stream(MODEL, store=store, write=False, decay=True, **CHOICE, **options).feed(TOKENS[:333])

    found = list(begin().generate(90))
    assert found != expected(store, TOKENS[:333], 90)
    stream = begin()
    assert list(stream.generate(45)) == found[:45]
    stream.save(tmp_path / "stream.safetensors")
    saved = Stream.load(tmp_path / "stream.safetensors", MODEL, store=store, write=False)
    for again in (saved, stream.fork(write=False), stream):
        assert list(again.generate(45)) == found[45:]
    assert [row[0] for row in generate_batch([begin(), begin()], 60)] == found[:60]
    with pytest.raises(ConfigError, match="have decay"):
        generate_batch([begin(), Stream(MODEL, store=store, write=False).feed([1])])
    with Store.open(tmp_path / "new", MODEL) as new:
        stream = Stream(MODEL, store=new, name="mine", decay=True).feed(TOKENS)
        stream.snapshot()
        half_life = stream.storage.half_life
    with Store.open(tmp_path / "new", MODEL, mode="r") as new:
        assert min(new.stats()["half_life"].values()) == half_life[0]
        assert new.engine.sources().keys() == {"mine", "bmojo:decay"}
