"""Exact predictors are white; those cut short fail where their memory ends; and every part is what its words say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from bmojo import BMojoLM, presets
from bmojo.data import ByteTokenizer, Document
from bmojo.errors import ConfigError, DataError
from bmojo.eval import TokenLists, diagnose
from bmojo.eval.diagnose import Reading, bands, choose, reach, read, sampled_lags, token_basis

# rows of very different entropy: the variance of the errors depends on the past
CHAIN = np.array([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.02, 0.9, 0.04, 0.04], [0.4, 0.1, 0.1, 0.4]])


def reading_of(tokens, q):
    """What a predictor q [T, vocab] of tokens [T] leaves, in one-hot vectors."""
    basis = token_basis(np.bincount(tokens, minlength=q.shape[1]), None)
    live = np.arange(len(tokens)) > 0
    return Reading(tokens, basis[tokens], np.where(live[:, None], basis[tokens] - q @ basis, 0.0), live)


def markov(chain, length, random):
    """Tokens of a Markov chain whose order is the number of dimensions of `chain` before the last."""
    order, size = chain.ndim - 1, chain.shape[-1]
    tokens = list(random.integers(0, size, order))
    sums = chain.cumsum(-1)
    for u in random.random(length - order):
        tokens.append(int((u > sums[tuple(tokens[-order:])]).sum()))
    return np.array(tokens)


def copying(lag, share, size, length, random):
    """Of uniform tokens, a share repeats the one `lag` before."""
    tokens = random.integers(0, size, length)
    for t in np.flatnonzero(random.random(length) < share):
        if t >= lag:
            tokens[t] = tokens[t - lag]
    return tokens


def failing(probes, found):
    return [band for band, probe in zip(found.bands, probes, strict=False) if probe.fails]


def test_an_exact_predictor_is_white_no_more_often_rejected_than_it_should_be():
    random, runs = np.random.default_rng(0), 60
    some, any_of_them = {"portmanteau": 0, "lags": 0, "own_past": 0, "text": 0, "repeats": 0}, 0
    for run in range(runs):
        tokens = markov(CHAIN, 2000, random)
        q = np.vstack([np.full(4, 0.25), CHAIN[tokens[:-1]]])
        found = diagnose.diagnose(reading_of(tokens, q), bands((1, 4, 16)), level=0.25, seed=run)
        assert found.level == 0.05
        any_of_them += not found.white
        some["portmanteau"] += found.p < 0.05
        some["lags"] += bool(found.failing)
        for name in ("own_past", "text", "repeats"):
            some[name] += bool(failing(getattr(found, name), found))
    assert max(some.values()) <= binom.ppf(0.9995, runs, 0.05), some
    assert any_of_them <= binom.ppf(0.9995, runs, 0.25), some
    assert sum(some.values()) > 5, "five tests of 5 % that never reject are no tests"


def test_the_failing_lag_is_the_one_that_is_forgotten():
    """A predictor with a window of 16 of a source that repeats what was 19 before."""
    random, runs = np.random.default_rng(0), 20
    others, inside, shares = 0, 0, []
    for run in range(runs):
        tokens = copying(19, 0.2, 6, 8000, random)
        found = diagnose.diagnose(reading_of(tokens, np.full((8000, 6), 1 / 6)), bands((1, 4, 16, 64)), seed=run)
        assert 19 in found.failing
        assert found.text[3].fails
        assert found.own_past[3].fails
        shares.append(found.text[3].share)
        others += bool(set(found.failing) - {19, 38})  # e_{t-38} is in e_{t-19}
        inside += len(failing(found.text, found)) > 1
    # What is there at one lag makes the others vary more than if nothing were (Bartlett): 0.12 of 60 series measured.
    assert max(others, inside) <= binom.ppf(0.999, runs, 0.12)
    # e_t = 0.2 e_{t-19} + noise, less what fitting 9 lags of 5 channels to 4,000 tokens costs without a penalty
    assert 0.2**2 - 9 * 5 / 4000 - 0.003 < np.mean(shares) < 0.2**2 + 0.003


def test_text_tells_where_memory_ends_and_past_errors_do_not():
    """The best predictor from one token, of a chain of order two."""
    chain = np.random.default_rng(1).dirichlet(np.full(3, 0.3), (3, 3))
    tokens = markov(chain, 12000, np.random.default_rng(0))
    counts = np.zeros((3, 3))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    q = np.vstack([np.full(3, 1 / 3), (counts / counts.sum(1, keepdims=True))[tokens[:-1]]])
    found = diagnose.diagnose(reading_of(tokens, q), bands((1, 2, 16)))
    assert not found.text[0].fails
    assert found.text[1].fails
    assert found.own_past[0].fails


def test_repeats_far_back_stand_in_for_what_is_near_and_not_used():
    """Of a chain of order one, memory needs one token, and a predictor that uses none fails beyond it too."""
    tokens = markov(CHAIN, 8000, np.random.default_rng(0))
    q = np.tile(np.bincount(tokens, minlength=4) / len(tokens), (len(tokens), 1))
    found = diagnose.diagnose(reading_of(tokens, q), bands((1, 16, 64)))
    assert found.text[0].fails
    assert found.repeats[2].fails


def test_repeats_are_found_where_they_are():
    """Passages of 40 random tokens, each heard again 140 tokens later, and a predictor that remembers none."""
    random = np.random.default_rng(0)
    parts = [random.integers(0, 8, (2, 100)) for _ in range(80)]
    tokens = np.concatenate([np.concatenate([a[:40], b, a[:40], b[:60][::-1]]) for a, b in parts])
    found = diagnose.diagnose(reading_of(tokens, np.full((len(tokens), 8), 1 / 8)), bands((1, 16, 64, 256)))
    assert (65, 256) in failing(found.repeats, found)
    assert found.repeats[3].share > 0.05
    assert found.repeats[3].share == max(probe.share for probe in found.repeats[:-1])
    assert max(probe.share for probe in found.text) < 0.2 * found.repeats[3].share


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    fields = {"vocab_size": 256, "hidden_size": 32, "num_heads": 2, "chunk_size": 8, "ssm_head_dim": 16}
    return BMojoLM(presets.bmojo("tiny", window=16, eidetic_slots=4, **fields)).double()


@pytest.fixture(scope="module")
def store():
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abc def"), length)) for length in (700, 30, 900)]
    return TokenLists([Document(str(i), text) for i, text in enumerate(texts)], ByteTokenizer())


@pytest.mark.parametrize("context", [None, 100])
@torch.no_grad()
def test_errors_are_those_of_the_definition_however_the_text_is_cut(model, store, context):
    chosen = choose(store, [1, 64])
    assert [len(document) for document in chosen.documents] == [700, 900]
    basis = token_basis(chosen.counts(256), model.embed.weight, channels=5)
    reading = read(model, chosen, basis, context=context, segment=37)
    assert reading.errors.shape == (700 + 64 + 900, 5)
    begin = 0
    for document in chosen.documents:
        tokens = torch.from_numpy(document.astype(np.int64))
        for start in range(0, len(document) - 1, context or len(document)):
            part = tokens[start : start + (context or len(document)) + 1]
            q = model(part[None, :-1])[0][0].softmax(-1).numpy()
            expected = basis[part[1:]] - q @ basis
            np.testing.assert_allclose(reading.errors[begin + start + 1 :][: len(q)], expected, atol=1e-12)
        begin += len(document) + 64
    dead = ~reading.live
    assert dead.sum() == 2 + 64
    assert (reading.errors[dead] == 0).all()
    assert (reading.tokens[700:764] == -1).all()
    assert (reading.vectors[700:764] == 0).all()


def test_the_basis_keeps_the_most_of_what_varies_in_the_text():
    random = np.random.default_rng(0)
    rows, counts = torch.from_numpy(random.standard_normal((9, 6))), random.integers(0, 50, 9)
    drawn = np.repeat(rows.numpy(), counts, axis=0)
    centred = drawn - drawn.mean(0)
    basis = token_basis(counts, rows, channels=3)
    assert np.linalg.norm(np.repeat(basis, counts, axis=0)) ** 2 == pytest.approx(
        (np.linalg.svd(centred)[1][:3] ** 2).sum()
    )
    assert token_basis(np.array([5, 0, 3, 0]), None).shape == (4, 1)
    with pytest.raises(DataError, match="one token over and over"):
        token_basis(np.array([0, 7, 0]), None)


def test_strengths_are_squared_correlations(monkeypatch):
    monkeypatch.setattr(diagnose, "ROWS", 64)
    e, past = np.random.default_rng(0).standard_normal((2, 200, 3))
    spread = np.outer((e**2).sum(0), (past**2).sum(0))
    expected = [((e[k:].T @ past[:-k]) ** 2 / spread).sum() for k in range(1, 41)]
    np.testing.assert_allclose(diagnose._strengths(e, past, 40), expected, rtol=1e-9)


def test_matches_are_the_nearest_of_a_band_by_a_literal_search(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 3, 150)
    tokens[70:90] = -1
    for n, same in zip(diagnose.ALIKE, diagnose._contexts(tokens), strict=True):
        for band in ((1, 1), (2, 9), (10, 20)):
            expected = []
            for t in range(len(tokens)):
                before = tokens[max(0, t - n) : t].tolist()
                whole = len(before) == n and -1 not in before
                found = [t - k for k in range(band[0], band[1] + 1)
                         if whole and t - k >= n and tokens[t - k - n : t - k].tolist() == before]  # fmt: skip
                expected.append(max(found, default=-1))
            np.testing.assert_array_equal(diagnose._matches(same, band), expected)


def test_a_probe_is_ridge_regression_on_the_first_half_scored_on_the_second(monkeypatch):
    monkeypatch.setattr(diagnose, "PENALTIES", (0.1,))
    monkeypatch.setattr(diagnose, "ROWS", 100)
    random = np.random.default_rng(0)
    e, past = random.standard_normal((2, 600, 2))
    e[12:, 0] += 0.5 * past[2:-10, 1]
    reading = Reading(random.integers(0, 9, 600), past, e, np.ones(600, dtype=bool))
    (probe, _) = diagnose._probe(reading, diagnose._lagged(reading, past, [(1, 12)]), 0, 0.05)
    strength = diagnose._strengths(e[:299], past[:299], 12)
    lags = np.sort(np.argsort(-strength)[: diagnose.PICKED]) + 1
    padded = np.vstack([np.zeros((12, 2)), past])
    x = np.array([[*(padded[t + 12 - k] for k in lags), padded[t : t + 12].mean(0)] for t in range(600)])
    x = x.reshape(600, -1)
    x = x / np.sqrt((x[:239] ** 2).mean(0))
    weights = np.linalg.solve(x[:299].T @ x[:299] / 299 + 0.1 * np.eye(x.shape[1]), x[:299].T @ e[:299] / 299)
    left = e[299:] - x[299:] @ weights
    assert probe.share == pytest.approx(1 - (left**2).sum() / (e[299:] ** 2).sum(), rel=1e-9)
    assert probe.fails


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("swa", {"window": 8, "num_layers": 2}),
        ("swa", {"window": 4, "num_layers": 3, "conv_size": 3}),
        ("bmojo", {"window": 8}),
        ("swa", {"window": 8, "num_layers": 2, "storage_layers": (0,), "storage_block": 4, "storage_stride": 4}),
        ("mamba2", {}),
        ("transformer", {}),
    ],
)
def test_reach_is_what_the_gradient_says(preset, settings):
    torch.manual_seed(0)
    fields = {"vocab_size": 11, "hidden_size": 32, "num_heads": 2, "chunk_size": 4, "ssm_head_dim": 16} | settings
    model = BMojoLM(presets.get(preset, "tiny", **fields)).double()
    x = torch.randn(1, 80, 32, dtype=torch.double, requires_grad=True)
    model.features(x)[0][0, -1].sum().backward()
    known = 80 - int(x.grad[0].abs().sum(-1).nonzero()[0, 0])
    found = reach(model.config)
    if model.config.storage_layers:  # what it looks for it may find anywhere
        assert found is None
        assert known > 15
    else:
        assert known == (80 if found is None else found)
    assert reach(model.config, 5) == 5


def test_bands_and_lags():
    assert bands((1, 4, 16)) == [(1, 1), (2, 4), (5, 16)]
    assert sampled_lags(20) == [*range(1, 18), 19, 20]
    assert sampled_lags(4096)[-9:] == [2048, 2233, 2435, 2656, 2896, 3158, 3444, 3756, 4096]
    with pytest.raises(ConfigError, match="ascend"):
        bands((4, 4))


def test_what_a_text_is_long_enough_for(store):
    chosen = choose(store, reach=7)
    assert chosen.bands == [(1, 1), (2, 4), (5, 7), (8, 16), (17, 64)]
    assert chosen.left_out[0].startswith("lags 65 to 4,096: they need 2,049 tokens")
    assert chosen.left_out[1:] == ["30 of 1,630 tokens, in documents shorter than 128"]
    assert [len(document) for document in choose(store, [1, 4], max_tokens=1100).documents] == [700, 30, 370]
    with pytest.raises(DataError, match=r"lags up to 256 need 2,049 tokens in documents of at least 512, got 1,600"):
        choose(store, [4, 256])
    with pytest.raises(DataError, match=r"lags up to 1 need 1,025 tokens .* got 500; give more text"):
        choose(store, max_tokens=500)
