import itertools

import numpy as np
import pytest

from bmojo.data.synthetic import EVALUATION, MQAR, NO_ANSWER, ZOOLOGY
from bmojo.errors import DataError

FILLERS = {"constant": 1, "alphabet": 16, "text": 256, "noise": 12}
SMALL = {"length": 64, "pairs": 6, "keys": 12, "values": 9}


def check(task, batch):
    """Every key comes twice: first with its value behind it, then as a question; all else is filler. The gaps."""
    gaps = []
    for tokens, labels, distance, facts in zip(
        batch["tokens"], batch["labels"], batch["distance"], task.facts(batch["tokens"]), strict=True
    ):
        keys = (tokens < task.keys).nonzero()[0]
        assert len(keys) == 2 * task.pairs
        first = {}
        for i in keys:
            if tokens[i] in first:
                fact = first.pop(tokens[i]) + 1
                assert labels[i] == tokens[fact]
                assert distance[i] == i - fact
                gaps.append(i - fact)
            else:
                first[tokens[i]] = i
                assert labels[i] == NO_ANSWER
                assert task.keys <= tokens[i + 1] < task.first_filler
                assert facts[i : i + 2].all()
        assert not first
        assert facts.sum() == 2 * task.pairs
        assert (labels != NO_ANSWER).sum() == task.pairs
        assert (distance[labels == NO_ANSWER] == 0).all()
        assert ((tokens >= task.first_filler) & (tokens < task.vocab_size)).sum() == task.length - 3 * task.pairs
    return np.array(gaps)


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("gap", [0, 7, 20])
def test_answers_and_gaps(filler, spread, gap):
    task = MQAR(**SMALL, filler=filler, spread=spread, gap=gap)
    assert task.vocab_size == 12 + 9 + FILLERS[filler]
    for number in (0, EVALUATION):
        batch = task.batch(number, 40)
        assert check(task, batch).min() > gap
        pairs = np.array([row.nonzero()[0].max() for row in task.facts(batch["tokens"])])
        questions = np.array([row.nonzero()[0].min() for row in batch["labels"] != NO_ANSWER])
        assert (questions - pairs > gap).all()


def test_pairs_stand_first_unless_spread():
    keys = (MQAR(**SMALL).batch(0, 200)["tokens"] < 12).nonzero()[1].reshape(200, 12)[:, :6]
    assert (keys == 2 * np.arange(6)).all()
    keys = (MQAR(**SMALL, spread=True).batch(0, 200)["tokens"] < 12).nonzero()[1].reshape(200, 12)[:, :6]
    assert set(keys.ravel()) == set(range(0, 32, 2))
    assert abs(keys.mean() - 15) < 1


@pytest.mark.parametrize("filler", ["alphabet", "noise"])
def test_filler_uses_its_whole_vocabulary(filler):
    task = MQAR(length=256, pairs=4, keys=12, filler=filler)
    tokens = task.batch(0, 50)["tokens"]
    counts = np.bincount(tokens[tokens >= task.first_filler] - task.first_filler)
    assert len(counts) == FILLERS[filler]
    assert counts.max() < 1.3 * counts.min()


def test_filler_of_text_reads_as_text():
    task = MQAR(length=2048, pairs=2, filler="text")
    tokens = task.batch(0, 50)["tokens"]
    counts = np.bincount(tokens[tokens >= task.first_filler] - task.first_filler)
    assert bytes([int(counts.argmax())]) == b" "
    assert counts[ord("e")] > 10 * counts[ord("Z")] > 0
    assert counts[0] == 0


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_the_first_pair_is_asked_by_the_power_law(power):
    task = MQAR(length=40, pairs=2, power=power, gap=4)
    batch = task.batch(0, 40_000)
    at = (batch["tokens"][:, 8:] == batch["tokens"][:, :1]).argmax(1) // 2  # from place 8 on: 4 of pairs, gap 4
    expected = np.arange(1, 17) ** (power - 1)
    expected *= len(at) / expected.sum()
    counts = np.bincount(at, minlength=16)
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 4 * np.sqrt(30)


@pytest.mark.parametrize("settings", ZOOLOGY)
def test_zoology(settings):
    task = MQAR(**settings)
    assert task.vocab_size == 8192
    assert check(task, task.batch(0, 3)).size == 3 * task.pairs
    assert (task.length, task.pairs) in {(64, 4), (128, 8), (256, 16), (512, 64)}


def test_keys_are_uniform():
    tokens = MQAR(**SMALL).batch(0, 5000)["tokens"]
    counts = np.bincount(tokens[:, 0:12:2].ravel(), minlength=12)
    assert (abs(counts - 2500) < 4 * np.sqrt(2500)).all()
    values = np.bincount(tokens[:, 1:12:2].ravel() - 12, minlength=9)
    assert (abs(values - 30_000 / 9) < 4 * np.sqrt(30_000 / 9)).all()


@pytest.mark.parametrize("spread", [False, True])
def test_at_distance(spread):
    task = MQAR(**SMALL, spread=spread)
    for distance in (32,) if spread else (12, 30, 52):
        assert (check(task, task.at_distance(distance, 20)) == distance - 1).all()
    assert (task.at_distance(32, 20)["tokens"] != task.batch(32, 20)["tokens"]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 13}, r"pairs must be between 1 and the number of keys \(12\), got 13"),
        ({"pairs": 0}, "pairs must be between 1"),
        ({"values": 0}, "values must be at least 1"),
        ({"power": 0.0}, "power must be above 0 and finite, got 0.0"),
        ({"power": float("nan")}, "power must be above 0 and finite, got nan"),
        ({"gap": -1}, "gap must not be negative"),
        ({"length": 23}, r"length must be at least 4 \* pairs \+ gap \(24\), got 23"),
        ({"gap": 41}, r"length must be at least 4 \* pairs \+ gap \(66\), got 64"),
        ({"filler": "texts"}, "unknown filler 'texts'; did you mean 'text'"),
        ({"spread": 1}, "spread must be bool, got 1"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(DataError, match=message):
        MQAR(**{**SMALL, **change})


@pytest.mark.parametrize(("spread", "gap"), [*itertools.product([False, True], [0, 5, 6, 9])])
def test_the_shortest_length_works(spread, gap):
    task = MQAR(length=24 + gap + gap % 2, pairs=6, gap=gap, spread=spread)
    check(task, task.batch(0, 20))
    with pytest.raises(DataError, match=f"got {task.length - 1}"):
        MQAR(length=task.length - 1, pairs=6, gap=gap, spread=spread)


@pytest.mark.parametrize("distance", [10, 13, 54])
def test_refuses_distances(distance):
    with pytest.raises(DataError, match=f"distance must be even, from 12 to 52 for 6 pairs .* got {distance}"):
        MQAR(**SMALL).at_distance(distance, 1)
