"""Portmanteau tests: equal to statsmodels', of the right size where variance changes, and powerful enough."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from statsmodels.stats.diagnostic import acorr_ljungbox
from statsmodels.stats.multitest import multipletests
from statsmodels.tsa.api import VAR

from bmojo.errors import ConfigError, DataError
from bmojo.realize import LTI, cva
from bmojo.realize.whiteness import rejected, whiteness


def white(samples, channels, seed=0):
    return np.random.default_rng(seed).standard_normal((samples, channels))


def changing_variance(samples, channels, random):
    """A martingale difference: white, but large errors follow large ones (GARCH, one variance for all channels)."""
    e = random.standard_normal((samples, channels))
    variance = 1.0
    for row in e:
        row *= variance**0.5
        variance = 0.1 + 0.4 * (row**2).mean() + 0.5 * variance
    return e


def autoregression(samples, matrix, random):
    y = random.standard_normal((samples, len(matrix)))
    for t in range(1, samples):
        y[t] += matrix @ y[t - 1]
    return y


def moving_average(samples, lag, weight, random):
    e = random.standard_normal((samples + lag, 2))
    return e[lag:] + weight * e[:-lag, ::-1]


def share_rejected(draw, runs, **settings):
    """Of `runs` series, the share of which the test of all lags rejects, and that with any lag failing."""
    random = np.random.default_rng(1)
    found = [whiteness(draw(random), 6, samples=99, seed=run, **settings) for run in range(runs)]
    return np.mean([f.total_p[-1] < 0.05 for f in found]), np.mean([bool(f.failing) for f in found])


def test_one_channel_is_ljung_box_of_statsmodels():
    e = autoregression(500, np.array([[0.3]]), np.random.default_rng(0))
    expected = acorr_ljungbox(e[:, 0], lags=12, model_df=3)
    found = whiteness(e, 12, fitted=3)
    np.testing.assert_allclose(found.ljung_box[:, 0], expected.lb_stat, rtol=1e-12)
    np.testing.assert_allclose(found.ljung_box_p[:, 0], expected.lb_pvalue, rtol=1e-9)


def test_channels_of_many_are_tested_by_themselves():
    e = white(300, 4) @ white(4, 4, seed=1)
    found = whiteness(e, 7)
    for channel in range(4):
        np.testing.assert_allclose(found.ljung_box[:, [channel]], whiteness(e[:, [channel]], 7).ljung_box, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 3])
def test_many_channels_are_the_portmanteau_of_statsmodels(order):
    matrix = np.array([[0.5, 0.2, 0.0], [0.0, 0.3, 0.1], [0.1, 0.0, -0.4]])
    model = VAR(autoregression(600, matrix, np.random.default_rng(0))).fit(order)
    for lags in (order + 1, 10):
        expected = model.test_whiteness(lags, adjusted=True)
        found = whiteness(model.resid, lags, fitted=9 * order)
        assert found.total[-1] == pytest.approx(expected.test_statistic, rel=1e-9)
        assert found.total_p[-1] == pytest.approx(expected.pvalue, rel=1e-6)
        assert found.total_df[-1] == expected.df


def test_statistics_are_those_of_the_definition_at_chosen_lags():
    e, lags = white(80, 3), [2, 5, 11]
    centred = e - e.mean(0)
    c0 = np.linalg.inv(centred.T @ centred / 80)
    for lag, q in zip(lags, whiteness(e, lags).each, strict=True):
        c = sum(np.outer(centred[t], centred[t - lag]) for t in range(lag, 80)) / 80
        assert q == pytest.approx(80**2 / (80 - lag) * np.trace(c.T @ c0 @ c @ c0), rel=1e-10)


def test_the_basis_of_the_channels_does_not_matter():
    e = white(200, 3)
    np.testing.assert_allclose(whiteness(e, 5).total, whiteness(e @ white(3, 3, seed=1) + 7, 5).total, rtol=1e-10)


@pytest.mark.parametrize("correction", ["holm", "bh"])
def test_correction_is_that_of_statsmodels(correction):
    random = np.random.default_rng(0)
    for strength in (1, 1, 4, 10, 40):
        p = random.random(20) ** strength
        expected = multipletests(p, 0.05, {"holm": "holm", "bh": "fdr_bh"}[correction])[0]
        np.testing.assert_array_equal(rejected(p, 0.05, correction), expected)


@pytest.mark.parametrize("null", ["table", "martingale", "permutation"])
def test_size_on_white_noise(null):
    low, high = binom.ppf([0.0005, 0.9995], 300, 0.05) / 300
    for share in share_rejected(lambda random: random.standard_normal((400, 2)), 300, null=null):
        assert low <= share <= high


def test_only_the_martingale_null_has_its_size_where_the_variance_changes():
    low, high = binom.ppf([0.0005, 0.9995], 300, 0.05) / 300

    def draw(random):
        return changing_variance(400, 2, random)

    for share in share_rejected(draw, 300, null="martingale"):
        assert low <= share <= high
    assert min(share_rejected(draw, 100, null="table")) > 0.25
    assert min(share_rejected(draw, 100, null="permutation")) > 0.25


def test_a_refitted_bootstrap_has_its_size_where_the_table_has_not():
    """Residuals of a VAR(2) fitted to 60 samples, tested at 3 lags: the table's degrees of freedom are too rough."""
    matrix = np.array([[0.6, 0.2], [-0.2, 0.6]])
    random = np.random.default_rng(0)

    def fit(y):
        past = np.hstack([y[1:-1], y[:-2]])
        weights = np.linalg.lstsq(past, y[2:], rcond=None)[0].T
        return weights, y[2:] - past @ weights.T

    rejections = []
    for run in range(60):
        weights, e = fit(autoregression(62, matrix, random))

        def again(generator, weights=weights, e=e):
            y = np.zeros((112, 2))
            noise = e[generator.integers(0, len(e), len(y))]
            for t in range(2, len(y)):
                y[t] = weights @ np.concatenate([y[t - 1], y[t - 2]]) + noise[t]
            return fit(y[50:])[1]

        rejections.append(whiteness(e, 3, null=again, samples=40, seed=run, fitted=8).total_p[-1] < 0.05)
    low, high = binom.ppf([0.0005, 0.9995], 60, 0.05)
    assert low <= sum(rejections) <= high


@pytest.mark.parametrize("null", ["table", "martingale", "permutation"])
def test_power(null):
    coloured, _ = share_rejected(lambda random: autoregression(400, np.diag([0.3, 0.0]), random), 40, null=null)
    assert coloured > 0.8  # noncentral chi2(24, 400 * 0.3^2 / (1 - 0.3^2)): 0.98
    random = np.random.default_rng(2)
    found = [whiteness(moving_average(800, 4, 0.4, random), 8, null=null, samples=99).failing for _ in range(20)]
    assert np.mean([4 in failing for failing in found]) == 1
    assert np.mean([failing == (4,) for failing in found]) > 0.7


def test_units_do_not_matter_and_whole_numbers_of_any_kind_are_lags():
    e = white(200, 2)
    expected = whiteness(e, 4).total
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(whiteness(e * [1, scale], np.arange(1, 5, dtype=np.uint8)).total, expected)


def test_draws_are_those_of_the_seed():
    e = white(200, 2)
    first, same, other = (whiteness(e, 4, null="martingale", seed=seed, samples=50) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.each_p, same.each_p)
    assert (first.each_p != other.each_p).all()


def test_no_degree_of_freedom_left_is_no_p_value():
    found = whiteness(white(200, 2), 3, fitted=4)
    assert np.isnan(found.total_p[0])
    assert found.total_df[2] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": white(20, 2)}, "20 samples of 2 channels are too few for lag 10; give at least 23"),
        ({"e": white(100, 2)[:, 0]}, r"shape \(100,\)"),
        ({"e": np.full((100, 2), 3.0)}, "channel 0 is constant"),
        ({"e": np.hstack([white(100, 1), np.full((100, 1), 0.1)])}, "channel 1 is constant"),
        ({"e": np.where(np.arange(200).reshape(100, 2) == 31, np.nan, 1.0)}, "got nan at sample 15 of channel 1"),
        ({"e": white(100, 2) @ np.ones((2, 3))}, "the 3 channels depend on each other"),
        ({"null": lambda random: white(99, 2)}, r"shape \(100, 2\) of the errors, got \(99, 2\)"),
    ],
)
def test_bad_errors_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        whiteness(**({"e": white(100, 2), "lags": 10} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lags": 0}, "got 0"),
        ({"lags": 2.5}, "whole number of at least 1, or ascending ones, got 2.5"),
        ({"lags": np.array([3, 2], np.uint8)}, "ascending"),
        ({"null": None}, "unknown null None"),
        ({"lags": [3, 2]}, "ascending"),
        ({"lags": []}, "ascending"),
        ({"fitted": 40}, "less than the 40 correlations"),
        ({"fitted": -1}, "got -1"),
        ({"fitted": 2, "null": "martingale"}, "simulates the model, fits it again and"),
        ({"null": "martingal"}, "did you mean 'martingale'"),
        ({"correction": "none"}, "known: bh, holm"),
        ({"level": 0.0}, "between 0 and 1"),
        ({"samples": 3, "null": "martingale"}, "at least 20"),
        ({"block": 0}, "block at least 1"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        whiteness(**({"e": white(100, 2), "lags": 10} | change))


SYSTEM = LTI.from_innovations(
    np.array([[0.9, 0.3, 0.0], [-0.3, 0.8, 0.0], [0.0, 0.0, -0.6]]),
    np.array([[0.5, 0.0], [0.2, 0.4], [0.0, 0.6]]),
    np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]]),
    np.array([[1.0, 0.3], [0.3, 0.5]]),
)


def test_innovations_of_the_true_kalman_filter_are_white_as_often_as_they_should_be():
    runs = 200
    e = SYSTEM.kalman(SYSTEM.simulate(500, batch=runs)).innovations
    rejections = sum(whiteness(row, 10).total_p[-1] < 0.05 for row in e)
    low, high = binom.ppf([0.0005, 0.9995], runs, 0.05)
    assert low <= rejections <= high


def test_residuals_of_an_identified_system_are_white_at_its_order_and_coloured_below():
    """2 n p = 12 parameters were fitted."""
    y = SYSTEM.simulate(20_000, seed=1)

    def residuals(n):
        return cva(y, n, lags=10).kalman(y - y.mean(0)).innovations

    assert whiteness(residuals(3), 12, fitted=12).total_p[-1] > 0.01
    below = whiteness(residuals(2), 12, fitted=8)
    assert below.total_p[-1] < 1e-20
    assert below.failing
    assert whiteness(residuals(1), 12, fitted=4).total_p[-1] < 1e-60


def test_parameters_fitted_to_few_samples_are_counted_by_a_refitted_bootstrap():
    """Each draw simulates the model, identifies it again, and returns what is left."""
    y = SYSTEM.simulate(400, seed=2)
    model = cva(y, 3, lags=4)
    mean = y.mean(0)

    def again(random):
        drawn = model.simulate(400, seed=int(random.integers(2**31)))
        return cva(drawn, 3, lags=4).kalman(drawn - drawn.mean(0)).innovations

    e = model.kalman(y - mean).innovations
    assert whiteness(e, 6, fitted=12, null=again, samples=30).total_p[-1] > 0.05
    short = cva(y, 1, lags=4).kalman(y - mean).innovations
    assert whiteness(short, 6, fitted=12, null=again, samples=30).total_p[-1] < 1e-6


def test_signs_kept_for_a_while_tell_the_lag_that_fails_from_the_others():
    """Strong correlation at lag 8 makes all others vary more than the hypothesis says (Bartlett's formula)."""
    random, alone, kept = np.random.default_rng(0), 0, 0
    for run in range(20):
        e = random.standard_normal((4000, 2))
        for t in range(8, len(e)):
            e[t] += 0.7 * e[t - 8]
        settings = {"null": "martingale", "samples": 99, "seed": run}
        alone += bool(set(whiteness(e, 12, **settings).failing) - {8})
        found = whiteness(e, 12, block=40, **settings)
        assert 8 in found.failing
        kept += bool(set(found.failing) - {8})
    assert alone >= 15
    assert kept <= 5


def test_blocks_of_signs_have_the_right_size():
    low, high = binom.ppf([0.0005, 0.9995], 200, 0.05) / 200
    for share in share_rejected(lambda random: changing_variance(1000, 2, random), 200, null="martingale", block=5):
        assert low <= share <= high
