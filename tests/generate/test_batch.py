"""Streams decoded together give what each gives alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import explains, new_model

from bmojo import Stream
from bmojo.errors import ConfigError, DataError
from bmojo.generate import generate_batch
from bmojo.generate.stream import COMMIT
from bmojo.nn.decoder import Decoder

MODEL = new_model().double()
LENGTHS = [1, 30, 7, 300]


def new_streams(model, lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [Stream(model, seed=i, temperature=0.8).feed(rng.integers(0, 50, n)) for i, n in enumerate(lengths)]


def close(streams, others):
    for stream, other in zip(streams, others, strict=True):
        assert stream.length == other.length
        for layer, theirs in zip(stream.state.layers, other.state.layers, strict=True):
            for name in layer:
                torch.testing.assert_close(layer[name], theirs[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bmojo", "transformer", "gdn", "mamba", "hybrid"])
def test_it_equals_each_alone(name):
    model = new_model(name).double()
    streams, alone = new_streams(model), new_streams(model)
    list(streams[2].generate(9))  # of different ages
    list(alone[2].generate(9))
    steps = list(generate_batch(streams, COMMIT + 9))
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == [list(s.generate(COMMIT + 9)) for s in alone]
    close(streams, alone)
    assert [list(s.generate(5)) for s in streams] == [list(s.generate(5)) for s in alone]


@pytest.mark.parametrize("static", [False, True])
def test_those_that_stop_are_dropped(monkeypatch, static):
    sizes = []

    def decoder(model, state, storage=None):
        sizes.append(state.batch_size)
        return Decoder(model, state, static=static)

    monkeypatch.setattr("bmojo.generate.batch.Decoder", decoder)
    model = new_model().double()
    streams, alone = new_streams(model), new_streams(model)
    steps = list(generate_batch(streams, 60, stop_ids=range(0, 50, 9)))
    expected = [list(stream.generate(60, stop_ids=range(0, 50, 9))) for stream in alone]
    for i, its in enumerate(expected):
        assert [tokens[i] for tokens in steps] == its + [None] * (len(steps) - len(its))
    close(streams, alone)
    live = [sum(len(its) >= step for its in expected) for step in range(len(steps))]
    changes = [4]
    for count in live:
        if count < changes[-1] and not (static and 2 * count > changes[-1]):
            changes.append(count)
    assert sizes == changes
    assert len(changes) > 1


@given(
    actions=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["feed", "generate", "restore", "sampling", "none"])), max_size=8
    )
)
@settings(max_examples=8)
def test_streams_that_are_used_between_two_tokens(actions):
    streams = new_streams(MODEL, [3, 9, 20])
    ids = [list(stream.snapshot().unread) for stream in streams]
    made = [[], [], []]
    kept = [(stream.snapshot(), list(its)) for stream, its in zip(streams, ids, strict=True)]
    batch = generate_batch(streams)

    def add(i, tokens):
        for token in tokens:
            made[i].append(len(ids[i]))
            ids[i].append(token)

    def check(i):
        assert streams[i].length == len(ids[i])
        assert explains(MODEL, ids[i], made[i], seed=i, temperature=0.8)

    for i, action in [(0, "none"), *actions]:
        if action == "feed":
            streams[i].feed([7, 8])
            ids[i] += [7, 8]
        elif action == "generate":
            add(i, streams[i].generate(2))
        elif action == "restore":
            check(i)
            streams[i].restore(kept[i][0])
            ids[i], made[i] = list(kept[i][1]), []
        elif action == "sampling":
            streams[i].sampling = streams[i].sampling
        for i, token in enumerate(next(batch)):
            add(i, [token])
    batch.close()
    for i, stream in enumerate(streams):
        add(i, stream.generate(3))
        check(i)


def test_one_that_is_broken_off_leaves_all_in_order():
    model = new_model().double()
    streams, alone = new_streams(model), new_streams(model)
    tokens = generate_batch(streams)
    for _ in range(5):
        next(tokens)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    hook.remove()
    for stream in alone:
        list(stream.generate(5))
    close(streams, alone)
    assert [list(s.generate(5)) for s in streams] == [list(s.generate(5)) for s in alone]


def test_states_are_kept_now_and_then():
    streams = new_streams(MODEL, [3, 9])
    tokens = generate_batch(streams)
    for _ in range(3 * COMMIT):
        next(tokens)
        assert all(len(stream._now.unread) <= COMMIT for stream in streams)


def test_a_cache_is_no_longer_than_it_was_alone():
    model = new_model("transformer")
    short, long = new_streams(model, [5, 700])
    size = short.snapshot().state.nbytes
    list(generate_batch([short, long], 3))
    list(short.generate(1))
    assert short.snapshot().state.nbytes == Stream(model).feed([0] * 9).state.nbytes > size


def test_refuses():
    model = new_model()
    stream = Stream(model)
    for streams, message in (([stream, stream], "only once"), ([stream, Stream(new_model())], "one model object")):
        with pytest.raises(ConfigError, match=message):
            generate_batch(streams)
    with pytest.raises(ConfigError, match="max_tokens"):
        generate_batch([stream], -1)
    with pytest.raises(DataError, match="feed the stream at least one token"):
        next(generate_batch([stream, stream.fork().feed([3])], 3))
    assert list(generate_batch([])) == list(generate_batch([stream], 0)) == []
