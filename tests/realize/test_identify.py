"""Systems from Markov parameters and from series; never worse than SLICOT's N4SID; refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from n4sid import n4sid, predictor_excess
from systems import stable, systems

from bmojo.errors import RealizationError
from bmojo.realize import LTI, cva, ho_kalman, whiteness


@given(systems())
def test_ho_kalman_gives_the_markov_parameters_back(m):
    n = m.sizes[0]
    h = m.impulse(2 * n + 2)
    found = ho_kalman(h, n)
    further = m.impulse(4 * n + 4)
    assert np.abs(found.impulse(4 * n + 4) - further).max() <= 1e-7 * np.abs(h).max()  # beyond what it was given
    assert np.abs(found.impulse(2 * n + 2) - h).max() <= 1e-9 * np.abs(h).max()
    # of the covariances it gives (A, G, C, L_0): the same covariances
    L, _ = m.covariances(2 * n + 2)
    assert np.abs(ho_kalman(L, n).impulse(2 * n + 2) - L).max() <= 1e-9 * np.abs(L).max()


@pytest.mark.parametrize("seed", range(6))
def test_ho_kalman_to_rounding(seed):
    h = stable(seed, 4, 3, 7, pairs=seed % 3).impulse(20)
    assert np.abs(ho_kalman(h).impulse(20) - h).max() <= 5e-15 * np.abs(h).max()


@pytest.mark.parametrize("seed", range(3))
def test_cva_predicts_nearly_as_well_as_the_truth(seed):
    truth = stable(seed, 4, 3, 7, pairs=seed)
    y = truth.simulate(20_000, seed + 100)
    model = cva(y, 4)
    exact = truth.excess(model)
    assert 0 <= exact <= 0.01
    fresh = truth.simulate(4000, seed + 200)  # the same on samples: excess is twice the nats of a sample
    nats = (model.kalman(fresh).bits - truth.kalman(fresh).bits).mean() * np.log(2)
    assert abs(2 * nats - exact) < 0.01
    L, L_hat = truth.covariances(3)[0], model.covariances(3)[0]
    assert np.abs(L - L_hat).max() <= 0.15 * np.abs(L).max()
    assert truth.excess(cva(y)) <= 0.01  # with an order of its own choice


def test_the_mean_and_the_units_do_not_matter():
    y = stable(3, 3, 2, 4).simulate(3000, 1)
    plain, scaled = cva(y, 3, lags=6), cva(y * [1e3, 1e-14] + [5, -7e-13], 3, lags=6)
    np.testing.assert_allclose(np.abs(scaled.poles), np.abs(plain.poles), rtol=1e-6)
    unit = np.diag([1e3, 1e-14])
    np.testing.assert_allclose(scaled.innovations().R_e, unit @ plain.innovations().R_e @ unit, rtol=1e-6)


def test_residuals_are_white_at_the_right_order_and_coloured_below():
    truth = stable(1, 4, 3, 7, pairs=1)
    y = truth.simulate(20_000, 0)
    right, low = (whiteness(cva(y, n).kalman(y).innovations, 20, fitted=2 * 3 * n) for n in (4, 1))
    assert right.total_p[-1] > 0.01
    assert low.total_p[-1] < 1e-60


def test_a_large_order_takes_the_lags_it_needs():
    assert cva(np.random.default_rng(0).standard_normal((5000, 2)), 12).sizes[0] == 12


def test_order_of_its_own_choice():
    truth = stable(1, 4, 3, 7, pairs=1)
    assert [cva(truth.simulate(20_000, seed)).sizes[0] for seed in range(3)] == [4, 4, 4]


def test_excess_is_zero_of_the_process_itself_and_positive_of_others():
    truth = stable(1, 4, 3, 7)
    assert abs(truth.excess(truth.whitened())) < 1e-10
    other = stable(2, 4, 3, 7)
    K, _, _ = other.innovations()
    np.testing.assert_allclose(truth.excess(other), predictor_excess(truth, other.A, K, other.C), rtol=1e-9)
    assert truth.excess(other) > 0.1
    white = LTI(np.zeros((1, 1)), np.zeros((1, 3)), np.zeros((3, 1)), np.eye(3))
    L_0 = truth.covariances(0)[0][0]
    expected = np.linalg.slogdet(L_0)[1] - np.linalg.slogdet(truth.innovations().R_e)[1]
    np.testing.assert_allclose(truth.excess(white), expected, rtol=1e-9)


def test_agrees_with_a_fitted_autoregression():
    """A vector autoregression of order 1 is a system of p states: both fits predict alike."""
    rng = np.random.default_rng(0)
    Phi = np.array([[0.7, 0.2], [-0.3, 0.5]])
    y = np.zeros((8000, 2))
    for t in range(1, 8000):
        y[t] = Phi @ y[t - 1] + rng.standard_normal(2)
    theirs = np.linalg.lstsq(y[:-1], y[1:], rcond=None)[0].T
    errors = y[1:] - y[:-1] @ theirs.T
    mine = cva(y, 2, lags=2)
    K, R_e, _ = mine.innovations()
    np.testing.assert_allclose(mine.C @ K, theirs, atol=4 / np.sqrt(8000))
    np.testing.assert_allclose(R_e, np.cov(errors.T), atol=4 / np.sqrt(8000))


@pytest.mark.slow
def test_not_above_n4sid():
    """At 20,000 samples: at most 0.01 in every data set, and of every system, on average over the seeds, below N4SID on
    the same data, whichever of three numbers of block rows serves it best in each."""
    for system in range(4):
        truth, mine, theirs = stable(system, 4, 3, 7, pairs=system % 3), [], []
        for seed in range(5):
            y = truth.simulate(20_000, 1000 * system + seed)
            mine.append(truth.excess(cva(y, 4)))
            theirs.append(min(predictor_excess(truth, *n4sid(y, 4, rows)) for rows in (6, 10, 15)))
        assert max(mine) <= 0.01
        assert np.mean(mine) <= np.mean(theirs)


NOISE = np.random.default_rng(0).standard_normal((500, 2))


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda: cva(NOISE[:10]), "too few samples"),
        (lambda: cva(NOISE[:1]), "2 samples or more"),
        (lambda: cva(NOISE, lags=200), "take lags <="),
        (lambda: cva(NOISE, lags=0), "lags must be a whole number of at least 1"),
        (lambda: cva(NOISE, 99, lags=4), "n, at most lags . outputs, must be a whole number in 1 ... 8"),
        (lambda: cva(np.ones((500, 2))), "constant"),
        (lambda: cva(np.concatenate((NOISE, np.full((500, 1), 3.7)), 1)), r"outputs \[2\] are constant"),
        (lambda: cva(np.concatenate((NOISE, NOISE.sum(1)[:, None]), 1)), "linearly dependent"),
        (lambda: cva(np.sin(np.arange(500.0))[:, None], 2, lags=4), "without error"),
        (lambda: cva(NOISE + 1.02 ** np.arange(500)[:, None] * [1, 0], 2, lags=2), "unstable"),
        (lambda: cva(np.where(NOISE > 2, np.nan, NOISE)), "must be finite"),
        (lambda: cva(NOISE[:, 0]), r"must be \[N, p\]"),
        (lambda: cva("text"), "real numbers"),
        (lambda: ho_kalman(np.ones((2, 1, 1))), "k >= 2"),
        (lambda: ho_kalman(np.ones((7, 1, 1)), 1.5), "n must be a whole number"),
        (lambda: cva(NOISE * 1e200), r"the series must be at most 1e\+150, got .*; take other units"),
        (lambda: ho_kalman(np.ones((7, 1, 1)), 3), "rank 1 determine 1 ... 1"),
        (lambda: stable(0, 2, 1, 2).excess(stable(0, 2, 2, 3)), "as many outputs"),
    ],
)
def test_refused(act, word):
    with pytest.raises(RealizationError, match=word):
        act()
