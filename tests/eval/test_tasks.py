from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from bmojo import BMojoLM, presets
from bmojo.data.synthetic import EVALUATION, MQAR, make_task, task_record
from bmojo.errors import ConfigError, DataError
from bmojo.eval import recall, score_task
from bmojo.eval.tasks import ask, fitting_task, interval, read_answers, wilson

TASK = MQAR(length=64, pairs=3, keys=8, values=8)
SMALL = {"vocab_size": TASK.vocab_size, "hidden_size": 32, "num_heads": 2, "window": 16, "chunk_size": 8}


class Oracle(nn.Module):
    """Looks up the token after the first time that it saw this one; its features are the answers' one-hot codes.

    In every call, the first `wrong` rows are answered with filler.
    """

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.config = presets.transformer("tiny", vocab_size=TASK.vocab_size)
        self.embed = nn.Embedding(1, 1)
        self.wrong = wrong

    def features(self, tokens, state=None, **_):
        first = (tokens[:, :, None] == tokens[:, None, :]).int().argmax(-1)
        answer = tokens.roll(-1, 1).gather(1, first)
        answer[: self.wrong] = TASK.first_filler
        return nn.functional.one_hot(answer, TASK.vocab_size).double() * 100, None

    def logits(self, features):
        return features


@dataclass(frozen=True)
class Numbers:
    """A task whose one question in 5 tokens has the number of the batch for its answer, and 1 as the stale one."""

    vocab_size: int = 17
    chance: float = 0.5

    def batch(self, number, rows):
        assert number >= EVALUATION
        tokens = np.zeros((rows, 5), dtype=np.int64)
        labels, stale = np.full((2, rows, 5), -100)
        labels[:, 3] = (number - EVALUATION) % 17
        stale[:, 3] = 1
        return {"tokens": tokens, "labels": labels, "distance": 3 * (labels >= 0), "stale": stale}


@pytest.fixture(scope="module", params=["bmojo", "transformer", "gdn"])
def model(request):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if request.param == "bmojo" or name != "window"}
    extra = {"eidetic_slots": 4} if request.param == "bmojo" else {}
    return BMojoLM(presets.get(request.param, "tiny", **sizes, ssm_head_dim=16, **extra)).double().eval()


def test_an_oracle_is_right():
    score = score_task(Oracle(), TASK, rows=20)
    assert (score["accuracy"], score["questions"], score["chance"]) == (1.0, 60, 1 / 8)
    assert score["ci95"] == wilson(1.0, 60)
    assert score["bits"] == pytest.approx(0, abs=1e-9)
    assert sum(count for *_, count in score["by_distance"]) == 60
    assert score["stale"] is None


def test_counts_by_distance():
    """The first row of every call is wrong."""
    score = score_task(Oracle(1), TASK, rows=16, batch_size=4)
    batch = TASK.batch(EVALUATION, 16)
    asked = batch["labels"] >= 0
    distance, right = batch["distance"][asked], asked.nonzero()[0] % 4 > 0
    assert score["accuracy"] == pytest.approx(0.75)
    for low, high, share, count in score["by_distance"]:
        inside = (distance >= low) & (distance < high)
        assert (share, count) == (pytest.approx(right[inside].mean()), inside.sum())
        assert high == 2 * low
    assert sum(count for *_, count in score["by_distance"]) == 48


def test_neither_batches_nor_segments_matter(model):
    whole = ask(model, TASK, rows=20, batch_size=20)
    for how in ({"batch_size": 3}, {"segment": 10}, {"segment": 1, "batch_size": 20}):
        found = ask(model, TASK, rows=20, **how)
        np.testing.assert_allclose(found.bits, whole.bits, rtol=1e-9)
        for name in ("row", "right", "distance"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert whole.row.tolist() == [row for row in range(20) for _ in range(3)]


def test_seeds_draw_other_rows_and_never_those_of_training(model):
    first, again, other = (ask(model, TASK, rows=4, seed=seed) for seed in (0, 0, 1))
    assert first.bits.tolist() == again.bits.tolist() != other.bits.tolist()
    fewer = ask(model, TASK, rows=2, seed=0)
    np.testing.assert_allclose(fewer.bits, first.bits[:6], rtol=1e-9)


def test_outdated_answers_are_told_from_wrong_ones():
    class Says(Oracle):
        def features(self, tokens, state=None, **_):
            return nn.functional.one_hot(torch.ones_like(tokens), 17).float(), None

    score = score_task(Says(), Numbers(), rows=40)  # batches of 16 rows: answers 0, 1, 2
    assert (score["accuracy"], score["stale"]) == (0.4, 1.0)
    assert score["by_distance"] == [[2, 4, 0.4, 40]]


def test_a_task_that_decodes_has_no_distances(model):
    batch = {
        "tokens": np.arange(24).reshape(3, 8) % 17,
        "labels": np.array([[1, 2], [3, -100], [4, 5]]),
        "decode": np.array([[15, 16]] * 3),
    }
    found = read_answers(model, batch, batch_size=2)
    assert found.row.tolist() == [0, 0, 1, 2, 2]
    assert found.distance.tolist() == [0] * 5
    assert np.isfinite(found.bits).all()


def test_untrained_models_guess(model):
    score = score_task(model, TASK, rows=32)
    assert score["accuracy"] < 0.5
    assert score["bits"] > 3


def test_wilson_is_that_of_the_literature():
    """Newcombe 1998, Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29."""
    for hits, n, expected in [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)),
                              (1, 29, (0.0061, 0.1718))]:  # fmt: skip
        assert wilson(hits / n, n) == pytest.approx(expected, abs=1e-4)


def test_interval_covers_the_share_when_the_questions_of_a_row_are_alike():
    draw, inside, narrow = np.random.default_rng(0), 0, 0
    for _ in range(300):
        right = np.repeat(draw.random(64) < 0.7, 8)
        low, high = interval(right, np.repeat(np.arange(64), 8))
        inside += low <= 0.7 <= high
        low, high = wilson(right.mean(), len(right))
        narrow += low <= 0.7 <= high
    assert 275 <= inside <= 296
    assert narrow < 200


def test_interval_of_independent_questions_is_wilson_s():
    right = np.array([True, True, False, True] * 20)
    assert interval(right, np.arange(80)) == pytest.approx(wilson(0.75, 80), abs=0.003)
    assert interval(right, np.repeat(np.arange(20), 4)) == wilson(0.75, 80)
    assert interval(np.ones(6, bool), np.repeat([0, 1], 3)) == wilson(1.0, 6)


def test_recall_counts_right_answers():
    assert recall(Oracle(), TASK, [6, 30], rows=10, batch_size=4) == [
        {"distance": distance, "pairs": 3, "accuracy": 1.0, "chance": 1 / 8, "length": 64} for distance in (6, 30)
    ]
    (score,) = recall(Oracle(2), TASK, [6], rows=10, batch_size=10)
    assert score["accuracy"] == 0.8


def test_refuses_what_does_not_fit(model):
    small = BMojoLM(presets.transformer("tiny", vocab_size=16, hidden_size=32, num_heads=2))
    for score in (lambda: recall(small, TASK, [6]), lambda: score_task(small, TASK)):
        with pytest.raises(ConfigError, match="vocab_size must be at least the task's 17, got 16"):
            score()
    with pytest.raises(DataError, match="distance must be even"):
        recall(Oracle(), TASK, [7])
    for how in ({"rows": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="must be at least"):
            score_task(model, TASK, **how)
    with pytest.raises(DataError, match="asks nothing in 3 rows"):
        score_task(model, make_task("drift", length=8, keys=3, values=8, asked=0.0), rows=3)
    assert fitting_task(model, task_record(TASK)) == TASK
    with pytest.raises(DataError, match="did you mean 'mqar'"):
        fitting_task(model, {"name": "mqaar"})
