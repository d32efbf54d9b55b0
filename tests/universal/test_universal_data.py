"""Outputs of random programs follow the table, and what is learnt from them is its M_norm."""

import numpy as np
import pytest

from bmojo.data.synthetic import NO_ANSWER, make_task
from bmojo.errors import UniversalError
from bmojo.universal import SolomonoffTable, compiled, sample
from bmojo.universal.sample import sample_outputs

SETTINGS = {"n_bits": 6, "depth": 7, "steps": 64}


@pytest.mark.parametrize("machine", ["bp7", "bp6"])
def test_outputs_begin_as_often_as_the_table_says(machine):
    rows, table = 200_000, SolomonoffTable.build(machine, **SETTINGS)
    bits, lengths = sample_outputs(np.random.default_rng(0), rows, machine, **SETTINGS, at_least=0)
    for t, level in enumerate(table.levels()[1:], 1):
        strings = bits[lengths >= t, :t] @ (1 << np.arange(t - 1, -1, -1))
        seen = np.bincount(strings, minlength=1 << t)
        expected = level / table.total
        assert (seen[level == 0] == 0).all()
        deviation = np.sqrt(rows * expected * (1 - expected)) + 1  # one more: rare strings are not Gaussian
        assert (np.abs(seen - rows * expected) < 5 * deviation).all()


def test_the_least_loss_of_the_task_is_that_of_m_norm():
    table = SolomonoffTable.build("bp7", n_bits=6, depth=10, steps=64)
    task = make_task("universal", length=6, depth=10, time_limit=64)
    counts = np.zeros((2, 64))  # what followed each prefix, as an integer with a leading one
    for number in range(40):
        batch = task.batch(number, 2000)
        prefix = np.ones(2000, int)
        for t in range(6):
            asked = batch["labels"][:, t] != NO_ANSWER
            np.add.at(counts, (batch["labels"][asked, t], prefix[asked]), 1)
            if t < 5:
                prefix = 2 * prefix + batch["tokens"][:, t + 1]
    checked = 0
    for t, ones in enumerate(table.predictions):
        for x, one in enumerate(ones):
            zeros_seen, ones_seen = counts[:, (1 << t) + x]
            seen = zeros_seen + ones_seen
            if seen >= 100:
                assert abs(ones_seen / seen - one) < 5 * np.sqrt(one * (1 - one) / seen) + 1 / seen
                checked += 1
    assert checked > 20


def test_the_task_says_where_an_output_ends():
    task = make_task("universal", length=24, depth=12)
    batch = task.batch(0, 400)
    assert (batch["tokens"][:, 0] == 2).all()
    ends = (batch["labels"] != NO_ANSWER).sum(1)
    assert ends.min() >= 1
    assert (ends < 24).any()
    assert (ends == 24).any()
    for tokens, labels, distance, end in zip(
        *(batch[key] for key in ("tokens", "labels", "distance")), ends, strict=True
    ):
        assert (labels[end:] == NO_ANSWER).all()
        assert (labels[: end - 1] == tokens[1:end]).all()
        assert (tokens[end + 1 :] == 0).all()
        assert (distance == np.where(np.arange(24) < end, np.arange(1, 25), 0)).all()
    assert ((make_task("universal", length=24, at_least=24).batch(0, 50)["labels"]) != NO_ANSWER).all()


def test_compiled_samples_are_those_of_the_machine(monkeypatch):
    fast = sample_outputs(np.random.default_rng(3), 300, n_bits=12, depth=20, steps=100)
    monkeypatch.setattr(compiled, "HAS_NUMBA", False)
    with pytest.warns(UserWarning, match="100 times slower without numba"):
        slow = sample_outputs(np.random.default_rng(3), 300, n_bits=12, depth=20, steps=100)
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(one, other)


def test_settings_that_print_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(sample, "_PATIENCE", 1000)
    with pytest.raises(UniversalError, match="programs of 2 instructions of bp7 printed 3 bits"):
        sample_outputs(np.random.default_rng(0), 4, n_bits=8, depth=2, at_least=3)


@pytest.mark.parametrize(
    "settings", [{"rows": 0}, {"n_bits": 0}, {"depth": 0}, {"steps": 0}, {"n_bits": 4, "at_least": 5}, {"at_least": -1}]
)
def test_samples_out_of_range_are_refused(settings):
    name, value = list(settings.items())[-1]
    with pytest.raises(UniversalError, match=f"{name} must be from [01] to .*, got {value}"):
        sample_outputs(np.random.default_rng(0), **{"rows": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"machine": "bp9"}, "unknown machine"),
        ({"depth": 0}, "depth must be from 1"),
        ({"at_least": 9}, "at_least must be from 1 to 8, got 9"),
    ],
)
def test_the_task_refuses(settings, says):
    with pytest.raises(ValueError, match=says):
        make_task("universal", length=8, **settings)


def test_a_dataset_is_the_same_batches_in_any_number_of_workers():
    from bmojo.universal.dataset import UniversalDataset

    dataset = UniversalDataset(rows=4, length=10, seed=5)
    first = [batch for batch, _ in zip(dataset, range(3), strict=False)]
    for number, batch in enumerate(first):
        again = dataset.batch(number)
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 10)
        assert all((batch[key] == again[key]).all() for key in batch)
    task = make_task("universal", length=10, seed=5).batch(1, 4)
    assert (first[1]["input_ids"].numpy() == task["tokens"]).all()
    assert (first[1]["labels"].numpy() == task["labels"]).all()


@pytest.mark.slow
def test_workers_share_the_batches():
    from torch.utils.data import DataLoader

    from bmojo.universal.dataset import UniversalDataset

    dataset = UniversalDataset(rows=4, length=10)
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn"))
    for number in range(6):
        batch = next(loader)
        assert (batch["input_ids"] == dataset.batch(number)["input_ids"]).all()
