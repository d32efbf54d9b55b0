"""Tasks that are sources: what they draw is what they say that they draw."""

import math

import numpy as np
import pytest

from bmojo.data.synthetic import EVALUATION, make_task
from bmojo.errors import DataError
from bmojo.realize import LTI
from bmojo.universal.ctw import CTW


@pytest.mark.parametrize(("name", "start"), [("markov_tree", 2), ("linear_gaussian", 32)])
def test_every_next_symbol_is_asked_behind_the_start(name, start):
    task = make_task(name, length=20)
    batch = task.batch(3, 7)
    assert (batch["tokens"][:, 0] == start).all()
    assert (batch["tokens"][:, 1:] == batch["labels"][:, :-1]).all()
    assert (batch["labels"] < start).all()
    assert (batch["distance"] == np.arange(1, 21)).all()
    assert task.vocab_size == start + 1


def test_bits_follow_their_trees():
    task = make_task("markov_tree", length=50, depth=5)
    sources = task.sources(EVALUATION, 9)
    bits, given = task.bits(EVALUATION, 9)
    assert (bits == task.batch(EVALUATION, 9)["labels"]).all()
    for row, (string, source) in enumerate(zip(bits, sources, strict=True)):
        past = [0] * 5
        for t, bit in enumerate(string):
            assert given[row, t] == source[int("".join(map(str, past)), 2)]
            past = [*past[1:], int(bit)]
    bits, given = make_task("markov_tree", length=100).bits(0, 2000)
    assert abs((bits - given).mean()) < 4 * np.sqrt((given * (1 - given)).mean() / bits.size)
    assert abs(((bits - given) * (given - 0.5)).mean()) < 4 * 0.5 * 0.5 / np.sqrt(bits.size)


def test_trees_have_the_leaves_and_odds_of_the_prior():
    """1 + depth / 2 leaves in the mean, and the arcsine law at every leaf: mean 1/2, variance 1/8, kurtosis 3/2."""
    sources = make_task("markov_tree", depth=6).sources(0, 8000)
    leaves = np.array([len(np.unique(source)) for source in sources])
    assert abs(leaves.mean() - 4) < 4 * leaves.std() / np.sqrt(len(leaves))
    assert abs((leaves == 1).mean() - 0.5) < 4 * 0.5 / np.sqrt(8000)
    odds = sources[:, 17] - 0.5
    for power, moment in ((1, 0), (2, 1 / 8), (4, 3 / 128)):
        assert abs((odds**power).mean() - moment) < 4 * (odds**power).std() / np.sqrt(8000)
    for split, distinct in ((0.0, 1), (1.0, 64)):
        for source in make_task("markov_tree", depth=6, split=split).sources(0, 5):
            assert len(np.unique(source)) == distinct
    source = make_task("markov_tree", depth=6).sources(1, 500)
    same = (source[:, :32] == source[:, 32:]).all(1) | (source[:, :16] != source[:, 16:32]).any(1)
    assert same.all()  # no split below an unsplit node: what the oldest bit tells, the one before it tells too


def test_the_mean_over_trees_is_ctw():
    """P(x) = E over trees of prod P(x_t | context), for every x of 5 bits."""
    strings = np.arange(32)[:, None] >> np.arange(4, -1, -1) & 1
    sources, probability = make_task("markov_tree", depth=3).sources(0, 60_000), 1.0
    context = np.zeros(32, int)
    for bit in strings.T:
        ones = sources[:, context]
        probability = probability * np.where(bit, ones, 1 - ones)
        context = (2 * context + bit) % 8
    expected = 2 ** CTW(3).log2_probability(strings)
    error = probability.std(0) / np.sqrt(len(probability))
    assert (np.abs(probability.mean(0) - expected) < 4.5 * error).all()


def test_systems_are_stable_and_their_outputs_have_unit_variance():
    task = make_task("linear_gaussian", length=40)
    A, Q, C, s, P = task.systems(0, 3000)
    poles = np.abs(np.linalg.eigvals(A))
    kept = poles[poles > 1e-9]
    assert 0.8 - 1e-6 <= kept.min() <= kept.max() <= 0.98 + 1e-6
    states = (poles > 1e-9).sum(1)
    assert set(states) == {2, 3, 4}
    assert np.abs(np.einsum("ri,rij,rj->r", C, P, C) + s - 1).max() < 1e-9
    np.testing.assert_allclose(A @ P @ A.swapaxes(1, 2) + Q, P, atol=1e-8)
    y = task.outputs(0, 3000)
    cross, expected = P @ C[:, :, None], np.ones(3000)  # E x y and E y(t) y(t+h), for h = 0
    for lag in range(4):
        products = (y[:, lag:] * y[:, : 40 - lag]).mean(1) - expected
        assert abs(products.mean()) < 4 * products.std() / np.sqrt(3000)
        cross = A @ cross
        expected = (C[:, None] @ cross)[:, 0, 0]
    assert abs(y[:, 0].var() - 1) < 0.1  # stationary from the first


def test_predictions_are_those_of_the_gaussian_law():
    """E[y_t | past] from the covariance matrix of all y at once, and from the Kalman filter of `bmojo.realize`."""
    task = make_task("linear_gaussian", length=30)
    A, Q, C, s, P = task.systems(5, 6)
    y, (mean, deviation) = task.outputs(5, 6), task.predictions(5, 6)
    for row in range(6):
        powers = [np.linalg.matrix_power(A[row], h) for h in range(30)]
        lags = np.array([C[row] @ power @ P[row] @ C[row] for power in powers])
        lags[0] += s[row]
        covariance = lags[np.abs(np.subtract.outer(np.arange(30), np.arange(30)))]
        root = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(root, y[row])
        np.testing.assert_allclose(deviation[row], np.diag(root), rtol=1e-8)
        np.testing.assert_allclose(y[row] - mean[row], np.diag(root) * whitened, atol=1e-8)
        values, vectors = np.linalg.eigh(Q[row])
        B = np.column_stack([vectors * np.sqrt(np.maximum(values, 0)), np.zeros(4)])
        D = np.array([[0, 0, 0, 0, math.sqrt(s[row])]])
        filtered = LTI(A[row], B, C[row][None], D).kalman(y[row][:, None])
        np.testing.assert_allclose(filtered.predictions[:, 0], mean[row], atol=1e-6)


def test_what_bins_hide_costs_little():
    task = make_task("linear_gaussian")
    y = task.outputs(1, 300)
    errors = {quantised: y - task.predictions(1, 300, quantised)[0] for quantised in (False, True)}
    fine = make_task("linear_gaussian", bins=4096)
    assert 1 < (errors[True] ** 2).mean() / (errors[False] ** 2).mean() < 1.05
    np.testing.assert_allclose(fine.predictions(1, 20, True)[0], fine.predictions(1, 20)[0], atol=0.02)
    z = errors[False] / task.predictions(1, 300)[1]
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / z.size)  # the innovations are as large as they are said to be


def test_bins_have_their_shares():
    task = make_task("linear_gaussian", bins=8, span=2.0)
    assert (task.edges == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]).all()
    assert (task.centres == np.arange(-1.75, 2, 0.5)).all()
    mean, deviation = np.array([[0.0, 0.3], [-3.0, 3.0]]), np.array([[1.0, 0.5], [0.1, 0.1]])
    shares = task.probabilities(mean, deviation)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-12)
    assert shares[0, 0, 4] == pytest.approx(math.erf(0.5 / math.sqrt(2)) / 2, rel=1e-12)
    assert shares[0, 1, 0] == pytest.approx(math.erfc(1.8 / 0.5 / math.sqrt(2)) / 2, rel=1e-12)
    np.testing.assert_allclose(shares[1, 0], shares[1, 1][::-1], rtol=1e-12)  # both tails as precisely
    assert shares[1, 0, 3] == pytest.approx(math.erfc(25 / math.sqrt(2)) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("markov_tree", {"depth": 17}, "depth must be from 0 to 16, got 17"),
        ("markov_tree", {"split": 1.5}, "split must be from 0 to 1, got 1.5"),
        ("linear_gaussian", {"bins": 1}, "bins must be at least 2, got 1"),
        ("linear_gaussian", {"span": 0.0}, "span must be above 0, got 0.0"),
        ("linear_gaussian", {"radius": 1.0}, "radius must be at least 0 and below 1, got 1.0"),
        ("linear_gaussian", {"inner": 0.99}, r"inner must be from 0 to radius \(0.98\), got 0.99"),
        ("linear_gaussian", {"noise": 0.0}, "noise must be above 0 and below 1, got 0.0"),
    ],
)
def test_sources_refuse(name, fields, message):
    with pytest.raises(DataError, match=message):
        make_task(name, **fields)
