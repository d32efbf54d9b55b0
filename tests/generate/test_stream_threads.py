"""Streams in threads: many of one model give what each gives alone; one is never corrupted."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from stream_cases import PROMPT, naive, new_model

from bmojo import Stream
from bmojo.generate import generate_batch


def in_threads(jobs):
    """What the jobs give, all started at once."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.parametrize("name", ["bmojo", "transformer", "gdn", "mamba", "hybrid"])
def test_many_streams_of_one_model(name):
    model = new_model(name)

    def job(i):
        stream = Stream(model, seed=i).feed(PROMPT[: 1 + i])
        first = list(stream.generate(20))
        return first + list(stream.feed(PROMPT).fork().generate(20))

    alone = [job(i) for i in range(6)]
    assert in_threads([lambda i=i: job(i) for i in range(6)]) == alone


def test_tokens_of_one_stream_go_to_one_thread_each():
    model = new_model().double()
    stream = Stream(model, seed=1).feed(PROMPT)
    given = in_threads([lambda: [(stream, token) for token in stream.generate(15)] for _ in range(4)])
    tokens = [token for part in given for _, token in part]
    assert sorted(tokens) == sorted(naive(model, PROMPT, 60, seed=1))
    assert list(stream.generate(5)) == naive(model, PROMPT, 65, seed=1)[60:]


def test_feeding_is_whole():
    model = new_model().double()
    stream, parts = Stream(model, seed=1).feed(PROMPT), [[i] * 40 for i in range(6)]
    in_threads([lambda part=part: stream.feed(iter(part)) for part in parts])
    ids = list(stream.snapshot().unread)
    order = [ids[len(PROMPT) + 40 * i] for i in range(6)]
    assert ids == PROMPT + [token for i in order for token in parts[i]]
    assert list(stream.generate(5)) == naive(model, ids, 5, seed=1)


def test_everything_at_once(tmp_path):
    """Feeding, generating, keeping and batches in turn leave a stream that its own tokens explain."""
    model = new_model()
    streams = [Stream(model, seed=i).feed(PROMPT) for i in range(3)]
    first = streams[0]
    restored = Stream(model)
    jobs = [
        lambda: [first.feed([7]) for _ in range(10)],
        lambda: list(first.generate(30)),
        lambda: list(generate_batch(streams, 30)),
        lambda: list(generate_batch(streams[::-1], 30)),
        lambda: [restored.restore(first.snapshot()) for _ in range(20)],
        lambda: [first.save(tmp_path / "stream") for _ in range(10)],
        lambda: [first.fork() for _ in range(20)],
    ]
    in_threads(jobs)
    assert [stream.length for stream in streams] == [len(PROMPT) + n for n in (100, 60, 60)]
    for stream in streams:
        now = stream.snapshot()
        assert now.length == int(now.state.position) + len(now.unread)
    assert int(restored.state.position) == restored.length
    assert Stream.load(tmp_path / "stream", model).length <= first.length
