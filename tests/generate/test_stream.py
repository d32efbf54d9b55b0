"""A stream equals the plain loop over its model, however it is cut, left, kept, saved or forked."""

import contextlib
import dataclasses
import functools
import io
import itertools
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stream_cases import PROMPT, explains, naive, new_model, same_stream

from bmojo import BMojoLM, MemoryState, Stream
from bmojo.data import ByteTokenizer, train_bpe
from bmojo.data.documents import Document
from bmojo.errors import ConfigError, DataError, StateError
from bmojo.generate import Sampling, generate_batch
from bmojo.generate.stream import COMMIT, SEGMENT
from bmojo.nn.decoder import Decoder
from bmojo.ops.dispatch import use_backend

TEXT_MODELS = {size: new_model(vocab_size=size) for size in (256, 300)}
CHOICE = {"temperature": 0.9, "top_p": 0.95, "seed": 5}


@pytest.mark.parametrize("name", ["bmojo", "transformer", "gdn", "mamba", "hybrid"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, CHOICE])
def test_it_is_the_loop_over_the_full_forward_pass(name, sampling):
    model = new_model(name).double()
    stream = Stream(model, **sampling).feed(PROMPT)
    assert list(stream.generate(COMMIT + 20)) == naive(model, PROMPT, COMMIT + 20, **sampling)


MODEL = new_model().double()
ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.lists(st.integers(0, 49), max_size=20)),
    st.tuples(st.just("generate"), st.integers(0, 12)),
    st.tuples(st.sampled_from(["snapshot", "restore", "fork", "save", "break"]), st.none()),
)


@contextlib.contextmanager
def interrupted(model, block):
    """Inside, Ctrl-C comes in the middle of every token or segment."""

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.blocks[block % len(model.blocks)].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        yield
    hook.remove()


@given(actions=st.lists(ACTIONS, max_size=12), seed=st.integers(0, 3))
def test_any_order_of_actions_equals_the_plain_loop(tmp_path_factory, actions, seed):
    """Against a list of tokens and forward passes over all of it."""
    sampling = {"temperature": 0.8, "seed": seed}
    stream, ids, made = Stream(MODEL, **sampling).feed(PROMPT[:2]), PROMPT[:2], []
    kept, count = (stream.snapshot(), ids, made), itertools.count()
    for action, value in [*actions, ("generate", 3)]:
        if action == "feed":
            stream.feed(value)
            ids = ids + value
        elif action == "generate":
            made = [*made, *range(len(ids), len(ids) + value)]
            ids = [*ids, *stream.generate(value)]
        elif action == "snapshot":
            kept = stream.snapshot(), ids, made
        elif action == "restore":
            assert explains(MODEL, ids, made, **sampling)
            stream.restore(kept[0])
            _, ids, made = kept
        elif action == "fork":
            left, stream = stream, stream.fork()
            list(left.feed([7]).generate(3))
        elif action == "save":
            path = tmp_path_factory.mktemp("streams") / "stream"
            stream.save(path)
            stream = Stream.load(path, MODEL)
        else:
            with interrupted(MODEL, next(count)):
                next(stream.generate(1))
        assert stream.length == len(ids)
    assert explains(MODEL, ids, made, **sampling)


@given(cuts=st.lists(st.integers(0, 700), max_size=6), one_by_one=st.booleans())
def test_any_cut_of_what_is_fed_gives_the_same_bits(cuts, one_by_one):
    model, ids = new_model(), np.random.default_rng(0).integers(0, 50, 700)
    whole, cut = Stream(model, **CHOICE).feed(ids), Stream(model, **CHOICE)
    for part in np.split(ids, sorted(cuts)):
        cut.feed(iter(part) if one_by_one else part)
    assert same_stream(whole, cut)
    assert list(whole.generate(5)) == list(cut.generate(5))
    assert same_stream(whole, cut)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("cut", [1, 7, COMMIT, COMMIT + 1])
def test_a_stream_that_is_kept_or_broken_off_goes_on_bit_for_bit(tmp_path, monkeypatch, cut, static):
    monkeypatch.setattr("bmojo.generate.stream.Decoder", functools.partial(Decoder, static=static))  # True: as on GPUs
    model = new_model()
    whole = Stream(model, **CHOICE).feed(PROMPT)
    ids = list(whole.generate(90))
    stream = Stream(model, **CHOICE).feed(PROMPT)
    assert list(stream.generate(cut)) == ids[:cut]
    with interrupted(model, 1):
        next(stream.generate(1))
    stream.save(tmp_path / "stream")
    for other in (Stream.load(tmp_path / "stream", model), stream.fork(), stream):
        assert list(other.generate(90 - cut)) == ids[cut:]
        assert same_stream(other, whole)


CHILD = """
import sys, torch
from bmojo import BMojoLM, Stream
torch.set_num_threads(1)
model = BMojoLM.load(sys.argv[1] + "/model")
print(*Stream.load(sys.argv[1] + "/stream", model).generate(80))
"""


@pytest.mark.slow
def test_another_process_goes_on(tmp_path):
    model = new_model()
    stream = Stream(model, **CHOICE).feed(PROMPT)
    list(stream.generate(10))
    model.save(tmp_path / "model")
    stream.save(tmp_path / "stream")
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True)
    assert [int(token) for token in done.stdout.split()] == list(stream.generate(80))


def test_iterators_that_are_left_or_fed_between():
    model = new_model().double()
    stream = Stream(model, temperature=0).feed(PROMPT)
    one, two = stream.generate(3), stream.generate(2)
    ids = [next(one), next(two)]
    assert ids == naive(model, PROMPT, 2, temperature=0)
    stream.feed([8, 9])
    fed = [*PROMPT, *ids, 8, 9]
    assert [next(one), next(two), next(one)] == naive(model, fed, 3, temperature=0)
    assert list(one) == list(two) == []
    assert stream.length == len(fed) + 3


def test_a_stop_is_part_of_the_stream_but_not_given():
    model = new_model()
    ids = list(Stream(model, **CHOICE).feed(PROMPT).generate(30))
    stop = ids[8]
    stream = Stream(model, **CHOICE).feed(PROMPT)
    tokens = stream.generate(stop_ids=[stop])
    assert list(tokens) == ids[: ids.index(stop)]
    assert list(tokens) == []
    assert stream.length == len(PROMPT) + ids.index(stop) + 1
    assert list(stream.generate(5)) == ids[ids.index(stop) + 1 :][:5]


def test_settings_can_change():
    model = new_model().double()
    stream = Stream(model, temperature=0).feed(PROMPT)
    twin = stream.fork(temperature=1.0, seed=3)
    assert list(twin.generate(9)) == naive(model, PROMPT, 9, seed=3)
    stream.sampling = twin.sampling
    assert list(stream.generate(9)) == naive(model, PROMPT, 9, seed=3)
    with pytest.warns(UserWarning, match="ignored: top_k; temperature 0"):
        stream.fork(temperature=0, top_k=3)


def test_its_state_has_read_everything():
    model = new_model().double()
    stream = Stream(model, temperature=0).feed(PROMPT)
    ids = PROMPT + list(stream.generate(4))
    before = stream.snapshot()
    logits, _ = model(torch.tensor([[*ids, 7]]))
    state = stream.state
    assert int(state.position) == len(ids)
    torch.testing.assert_close(model(torch.tensor([[7]]), state)[0][0, 0], logits[0, -1])
    assert stream.snapshot() is before
    on = Stream(model, state=state, temperature=0).feed([7])
    assert next(on.generate(1)) == int(logits[0, -1].argmax())


def test_a_state_is_left_as_it_is(tmp_path):
    model = new_model()
    _, state = model(torch.tensor([PROMPT]))
    before = state.clone()
    stream = Stream(model, state=state)
    with pytest.raises(DataError, match="feed the stream at least one token"):
        next(stream.generate(1))
    list(stream.feed([7]).generate(20))
    for layer, old in zip(state.layers, before.layers, strict=True):
        assert all(torch.equal(layer[name], old[name]) for name in old)
    state.save(tmp_path / "state")
    loaded = Stream.load(tmp_path / "state", model).feed([7])
    list(loaded.generate(20))
    assert same_stream(loaded, stream)


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_it_may_be_used_in_and_out_of_inference_mode(backend):
    model = new_model()
    with use_backend(backend):
        whole = list(Stream(model, **CHOICE).feed(PROMPT).generate(20))
        stream = Stream(model, **CHOICE)
        with torch.inference_mode():
            stream.feed(PROMPT)
            ids = list(stream.generate(5))
        ids += stream.generate(5)
        with torch.inference_mode():
            ids += [token for (token,) in generate_batch([stream], 5)]
        assert [*ids, *stream.generate(5)] == whole
        assert not stream.snapshot().state.position.is_inference()


# memory
def test_memory_is_constant():
    model = new_model()
    stream = Stream(model, temperature=0).feed(PROMPT)
    tokens = stream.generate()
    next(tokens)
    size = stream.snapshot().state.nbytes
    next(tokens)
    buffers = [layer["k"].data_ptr() for layer in stream._decoder._state.layers]
    for _ in range(3 * COMMIT):
        next(tokens)
        assert len(stream._now.unread) <= COMMIT
    assert stream.snapshot().state.nbytes == size
    assert [layer["k"].data_ptr() for layer in stream._decoder._state.layers] == buffers


@pytest.mark.slow
def test_a_source_without_end_is_read_in_constant_memory():
    stream, rng = Stream(new_model(hidden_size=16, ssm_head_dim=8)), np.random.default_rng(0)
    source = (int(token) for _ in itertools.count() for token in rng.integers(0, 50, 1000))
    stream.feed(itertools.islice(source, 20_000))
    size, resident = stream.snapshot().state.nbytes, peak()
    stream.feed(itertools.islice(source, 80_000))
    assert stream.length == 100_000
    assert stream.snapshot().state.nbytes == size
    assert len(stream.snapshot().unread) <= SEGMENT
    assert peak() - resident < 8e6  # 80,000 more tokens as Python numbers would take that and more


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# what is fed
def test_forms_of_tokens():
    model = new_model()
    whole = Stream(model).feed(PROMPT)
    forms = [
        tuple(PROMPT), np.array(PROMPT, np.uint8), torch.tensor(PROMPT), iter(PROMPT), map(np.int64, PROMPT),
        [PROMPT[:4], np.array(PROMPT[4:])], (torch.tensor(token) for token in PROMPT), [PROMPT[0], PROMPT[1:]],
    ]  # fmt: skip
    for form in forms:
        assert same_stream(Stream(model).feed(form), whole)
    for token in PROMPT:
        last = Stream(model).feed(token)
    assert last.length == 1
    assert Stream(model).feed([]).feed(iter(())).length == 0


def test_forms_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr("bmojo.generate.stream.BLOCK", 128)
    model, text = TEXT_MODELS[256], "Grüße, one\r\n\n\ttwo\n" * 30  # several blocks
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    whole = Stream(model).feed(np.frombuffer(text.encode(), np.uint8))
    with path.open(encoding="utf-8", newline="") as file, path.open("rb") as raw:
        for form in (text, text.encode(), file, raw, io.StringIO(text, newline=""), iter(text.splitlines(True))):
            assert same_stream(Stream(model).feed(form), whole)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    texts = [Document(str(i), f"Größe {i} für die Füße,\n\n  und 🙂🙂 {i}\n" * 9) for i in range(20)]
    return train_bpe(texts, 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_blocks_of_text_end_at_lines_so_that_tokens_are_those_of_the_whole(bpe, monkeypatch):
    monkeypatch.setattr("bmojo.generate.stream.BLOCK", 50)
    model, text = TEXT_MODELS[300], "Größe für die Füße,\n\n  und mehr\n" * 30
    blocks = Stream(model, bpe).feed(text)
    assert same_stream(blocks, Stream(model, bpe).feed(bpe.encode(text)))


# text
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@given(data=st.data())
def test_text_cut_anywhere_is_the_text_of_all_tokens(bpe, tmp_path_factory, tokenizer, data):
    codec = ByteTokenizer() if tokenizer == "bytes" else bpe
    stream = Stream(TEXT_MODELS[codec.vocab_size], codec, seed=data.draw(st.integers(0, 99))).feed("und ")
    expected = codec.decode([*codec.encode("und "), *stream.fork().generate(10)])
    path, text, left = tmp_path_factory.mktemp("text") / "stream", "und ", 10
    while left:
        count = data.draw(st.integers(1, left))
        text += "".join(stream.text(count))
        left -= count
        if data.draw(st.booleans()):
            stream.save(path)
            stream = Stream.load(path, stream.model, codec)
    assert text + stream.held_back == expected


def says(text, start=0):
    """A choice that makes a stream say `text`, a byte a token, from the position `start` on."""
    ids = text.encode()
    return type("Says", (Sampling,), {"choose": lambda self, logits, position: ids[position - start]})()


def test_a_character_cut_between_feed_and_text_is_completed():
    face = "🙂".encode()
    stream = Stream(TEXT_MODELS[256]).feed(20 * "🙂").feed(face[:3])
    assert stream.held_back == "\ufffd"
    stream.sampling = type("Says", (Sampling,), {"choose": lambda self, logits, position: face[3]})()
    assert "".join(stream.text(1)) == "🙂"
    assert stream.held_back == ""


@pytest.mark.parametrize(
    ("stop", "expected", "length"),
    [
        ("\nUser:", "Hello, Us\nUse", 20),
        (["\nUser:", "lo"], "Hel", 6),
        ("Us", "Hello, ", 10),
        ("never", "Hello, Us\nUse\nUser: ", 21),
        (" \t", "Hello, Us\nUse\nUser: ", 21),
    ],
)
def test_text_ends_before_a_stop(stop, expected, length):
    stream = Stream(TEXT_MODELS[256])
    stream.feed("x")
    stream.sampling = says("Hello, Us\nUse\nUser: ", 1)
    assert "".join(stream.text(len("Hello, Us\nUse\nUser: "), stop=stop)) == expected
    assert stream.length == length


def test_text_does_not_wait_for_what_can_be_no_stop():
    stream = Stream(TEXT_MODELS[256]).feed("x")
    stream.sampling = says("ab\n\nc", 1)
    pieces = stream.text(stop="\n\nUser")
    assert [next(pieces), next(pieces)] == ["a", "b"]
    assert next(pieces) == "\n\nc"
    assert "".join(stream.fork().text(0, stop_ids=[3])) == ""


# what is refused
@pytest.mark.parametrize(
    ("fed", "message"),
    [
        ([50], r"token ids must lie in 0\.\.49, got 50"),
        ([-1, 3], r"token ids must lie in 0\.\.49, got -1"),
        ([1.5], "float"),
        ([True], "whole numbers"),
        ([2**70], "whole numbers"),
        (np.zeros((2, 2), int), "in one row"),
        (np.zeros(2), "whole numbers"),
        (None, "fed text, token ids, or an iterable or open file of them, got NoneType"),
        ("text", "text needs a tokenizer"),
        (b"text", "text needs a tokenizer"),
    ],
)
def test_refuses_to_be_fed(fed, message):
    stream = Stream(new_model()).feed(PROMPT)
    before = stream.snapshot()
    with pytest.raises(DataError, match=message):
        stream.feed(fed)
    assert stream.snapshot() is before


def test_refuses(bpe):
    model = new_model()
    for settings, message in (
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Stream(model, **settings)
    with pytest.raises(ConfigError, match="300 tokens, the model 50"):
        Stream(model, bpe)
    stream = Stream(model)
    for call, message in (
        (lambda: stream.generate(-1), "max_tokens must be at least 0, got -1"),
        (lambda: Stream(TEXT_MODELS[256]).text(-1), "max_tokens"),
        (lambda: Stream(TEXT_MODELS[256]).text(stop=""), "a stop must have a character"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(DataError, match="text needs a tokenizer"):
        stream.text(3)
    with pytest.raises(DataError, match="got bytes for the tokenizer tokenizer; decode them"):
        Stream(TEXT_MODELS[300], bpe).feed(b"text")
    with pytest.raises(DataError, match="feed the stream at least one token"):
        next(stream.generate(1))
    assert list(stream.generate(0)) == []
    with pytest.raises(StateError, match="batch size 2"):
        Stream(model, state=model.empty_state(2))
    with pytest.raises(StateError, match="another model"):
        Stream(model, state=new_model("gdn").empty_state())
    with pytest.raises(StateError, match="another model"):
        stream.restore(Stream(new_model("gdn")).feed([3]).snapshot())
    with pytest.raises(StateError, match=r"float32 rows, the model torch\.float64"):
        Stream(new_model().double(), state=model.empty_state())


def test_refuses_files(tmp_path, bpe):
    model, path = TEXT_MODELS[256], tmp_path / "stream"
    Stream(model).feed("text").save(path)
    note = MemoryState.load(path).note["stream"]
    torch.manual_seed(1)
    with pytest.raises(StateError, match="was made with other weights: their fingerprint is"):
        Stream.load(path, BMojoLM(model.config))
    for change, message in (
        ({"version": 2}, "has stream format 2, this bmojo reads up to 1; update"),
        ({"version": "x"}, "is damaged"),
        ({"length": 3}, "3 tokens, of which 0 are read and 4 unread"),
        ({"unread": [256, 1, 1, 1]}, r"0\.\.255"),
        ({"sampling": {"top_p": 3}}, "top_p"),
        ({"sampling": {"other": 3}}, "other"),
        ({"held": [1]}, "is damaged"),
    ):
        write_note(path, model, note | change)
        with pytest.raises(StateError, match=message):
            Stream.load(path, model)
    write_note(path, model, "text")
    with pytest.raises(StateError, match="is damaged"):
        Stream.load(path, model)
    Stream(TEXT_MODELS[300], bpe).feed("text").save(path)
    with pytest.raises(StateError, match="another model"):
        Stream.load(path, model)
    write_note(path, model, note | {"tokenizer": "other"})
    with pytest.raises(StateError, match="another tokenizer than bytes"):
        Stream.load(path, model)
    with pytest.raises(StateError, match="no memory state at"):
        Stream.load(tmp_path / "missing", model)


def write_note(path, model, note):
    dataclasses.replace(model.empty_state(), note={"stream": note}).save(path)


def test_ctrl_c_at_any_moment_leaves_a_stream_in_order():
    """Against one that nothing breaks off: the same tokens, of which some were not given, and the same bits."""
    model, rng = new_model(), np.random.default_rng(0)
    stream, whole = Stream(model, **CHOICE).feed(PROMPT), Stream(model, **CHOICE).feed(PROMPT)
    list(stream.fork().generate(2))  # loads what else would be broken off each time

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(30):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-3, 4e-2))
                for _ in stream.generate():
                    pass
            list(whole.generate(stream.length - whole.length))
            assert stream.length == int(stream.snapshot().state.position) + len(stream.snapshot().unread)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stream.length > len(PROMPT)
    assert same_stream(stream, whole)
    assert list(stream.generate(5)) == list(whole.generate(5))
