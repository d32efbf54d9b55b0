"""Decay learned from prediction: theory of fixed share, what it does in worlds that change, and what it may not do."""

from __future__ import annotations

import itertools
import json
import logging
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bmojo.errors import ConfigError, DataError, StateError
from bmojo.memory.decay import Decay, DecayPolicy, DriftAlarm, clusters_of, fixed_share, rate_losses, reranked
from bmojo.memory.engines import Block, open_store
from bmojo.memory.engines.engine import MemoryEngine

RATES = DecayPolicy().half_lives
SHARE, J = DecayPolicy().share, len(RATES)


def draw(seed=0):
    return np.random.default_rng(seed)


def after(losses, cluster=None, **settings) -> Decay:
    return Decay(DecayPolicy(**settings)).update(np.asarray(losses), cluster)[0]


def switching(steps: int, period: int, seed: int = 0) -> np.ndarray:
    """Losses [steps, J] of which another column is the lowest in each period."""
    losses = 1 + draw(seed).random((steps, J))
    losses[np.arange(steps), np.arange(steps) // period % J] -= 0.9
    return losses


# the rule


def test_fixed_share_is_its_formula():
    w, loss = draw().dirichlet(np.ones(J)), draw(1).random(J)
    m = (w * 2**-loss).sum()
    new, bits = fixed_share(np.log(w), loss, 0.1, np.log(1 / J))
    assert_allclose(np.exp(new), 0.9 * w * 2**-loss / m + 0.1 / J)
    assert_allclose(bits, -np.log2(m))


def test_weights_sum_to_one_whatever_the_losses():
    losses = draw().exponential(200, (300, J))
    losses[::7] = 0
    cluster = draw(1).integers(4, size=300)
    decay = after(losses, cluster, clusters=4)
    assert_allclose(np.exp(decay.rates).sum(-1), 1)
    assert_allclose(np.exp(decay.trust).sum(-1), 1)
    assert_allclose(np.exp(decay.log_weights(np.arange(4))).sum(-1), 1)
    assert (np.exp(decay.rates) >= SHARE / J * 0.999).all()


@pytest.mark.parametrize("period", [50, 200, 1000])
@pytest.mark.parametrize("share", [0.001, 0.005, 0.05])
def test_regret_to_the_best_sequence_is_within_its_bound(period, share):
    steps = 1000
    for losses in (switching(steps, period), draw(1).exponential(3, (steps, J))):
        _, bits = Decay(DecayPolicy(share=share)).update(losses)
        pieces = losses.reshape(-1, period, J).sum(1)
        changes = np.count_nonzero(np.diff(pieces.argmin(-1)))
        stayed = (steps - 1 - changes) * math.log2(1 - share + share / J)
        bound = math.log2(J) + changes * math.log2(J / share) - stayed
        assert bits.sum() <= pieces.min(-1).sum() + bound + 1e-9


def test_clusters_cost_at_most_the_distrust_they_start_with():
    losses, cluster = switching(2000, 400), draw(2).integers(64, size=2000)
    together = Decay().update(losses)[1].sum()
    apart = Decay().update(losses, cluster)[1].sum()
    visits = np.bincount(cluster)
    bound = (math.log2(1 / 0.9) - (visits - 1) * math.log2(1 - SHARE + 0.9 * SHARE)).sum()
    assert apart <= together + bound


def test_clusters_learn_rates_of_their_own():
    """Keys of cluster 0 never change, those of cluster 1 all the time; a cluster not seen goes by all."""
    losses = np.full((600, J), 4.0)
    losses[::2, 0] = losses[1::2, -1] = 1
    decay, bits = Decay(DecayPolicy(clusters=4)).update(losses, np.arange(600) % 2)
    weights = np.exp(decay.log_weights(np.arange(4)))
    assert weights[0, 0] > 0.9
    assert weights[1, -1] > 0.9
    assert np.abs(weights[2] - np.exp(decay.log_weights())).max() < 0.1
    assert bits[300:].mean() < Decay(DecayPolicy(clusters=4)).update(losses)[1][300:].mean() - 0.5


def test_one_rate_without_share_is_exponential_decay():
    decay = after(draw().random((50, 1)), half_lives=[100], share=0)
    ages, logits = draw(1).integers(1000, size=20), draw(2).normal(size=20)
    assert_allclose(np.exp(decay.log_mixture(ages)), 2 ** (-ages / 100), rtol=1e-12)
    assert_allclose(decay.half_life, 100)
    weight = np.exp(logits) * 2 ** (-ages / 100)
    assert_allclose(np.exp(decay.scores(logits, ages)), weight / weight.sum() * np.exp(logits).sum())


def test_one_infinite_rate_changes_no_score():
    decay, logits = after(np.ones((9, 1)), half_lives=[math.inf]), draw().normal(size=(3, 20))
    assert_allclose(decay.scores(logits, np.arange(20)), logits)
    assert decay.half_life == math.inf


def test_predictions_in_batches_equal_one_by_one():
    losses, cluster = draw().exponential(2, (40, J)), draw(1).integers(6, size=40)
    whole, bits = Decay(DecayPolicy(clusters=6)).update(losses, cluster)
    one, alone = Decay(DecayPolicy(clusters=6)), []
    for part in (slice(0, 1), slice(1, 17), slice(17, 17), slice(17, 40)):
        one, some = one.update(losses[part], cluster[part])
        alone.extend(some)
    assert_array_equal(one.rates, whole.rates)
    assert_array_equal(one.trust, whole.trust)
    assert_array_equal(alone, bits)


def test_an_update_changes_no_other_value():
    old = Decay()
    before = old.rates.copy(), old.trust.copy()
    old.update(switching(10, 5), np.zeros(10, int))
    assert_array_equal(old.rates, before[0])
    assert_array_equal(old.trust, before[1])


def test_noise_that_is_bad_for_all_moves_no_weight():
    decay = after(switching(300, 300), share=0)
    assert_allclose(decay.update(np.full((50, J), 30.0))[0].rates, decay.rates, atol=1e-9)


# a memory of pairs in a world that changes


def pairs(
    steps: int, change: int | None = None, seed: int = 0, keys: int = 32, values: int = 16
) -> tuple[np.ndarray, ...]:
    """Keys and values [steps]: the value of a key is right with probability 0.9; all are others from `change` on."""
    random = draw(seed)
    key, noise = random.integers(keys, size=steps), random.integers(values, size=steps)
    right = random.integers(values, size=keys)[key] + (np.arange(steps) >= (change or steps))
    return key, np.where(random.random(steps) < 0.9, right % values, noise)


def losses_of_pairs(key: np.ndarray, value: np.ndarray, keys: int = 32, values: int = 16) -> np.ndarray:
    """`rate_losses` [steps, J] of a memory of all earlier pairs with the same key, from running sums of its votes."""
    votes, losses = np.zeros((keys, values, J)), np.empty((len(key), J))
    for t, (k, v) in enumerate(zip(key, value, strict=True)):
        total = votes[k].sum(0)
        losses[t] = -np.log2(0.9 * votes[k, v] / total + 0.1 / values) if total.all() else math.log2(values)
        votes *= 2 ** (-1 / np.array(RATES))
        votes[k, v] += 1
    return losses


def test_running_sums_are_the_losses_of_the_retrieved():
    key, value = pairs(300)
    losses = losses_of_pairs(key, value)
    for t in (0, 5, 100, 299):
        past = np.flatnonzero(key[:t] == key[t])
        whole = rate_losses(np.zeros(len(past)), t - past, value[past], value[t], -np.log(16), RATES)
        assert_allclose(losses[t], whole)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_a_world_that_stands_still_the_mass_moves_to_the_infinite_half_life(seed):
    """Facts written once, one a chunk, and asked for at any later time: logit 10 for the fact, 0 for the others."""
    now = np.arange(10_000, 13_000)[:, None]
    ages, half_lives = draw(seed).integers(now), np.array(RATES)
    others = np.append(now, np.tile(1 / (1 - 2 ** (-1 / half_lives[1:])), (3000, 1)), 1)
    fact = np.exp(10) * 2.0 ** (-ages / half_lives)
    decay = after(-np.log2(0.9 * fact / (fact + others) + 0.1 / 16))
    assert np.exp(decay.log_weights())[0] > 0.9
    assert decay.half_life == math.inf


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_after_a_change_the_half_life_is_at_most_three_times_the_time_since_and_recovers(seed):
    change, decay, half_life = 2000, Decay(), {}
    losses = losses_of_pairs(*pairs(6000, change, seed))
    for step in range(0, 6000, 10):
        half_life[step - change] = decay.half_life
        decay, _ = decay.update(losses[step : step + 10])
    assert np.median([h for since, h in half_life.items() if -500 < since <= 0]) > 1000
    assert all(h <= 3 * since for since, h in half_life.items() if 30 <= since < 1000)
    assert min(h for since, h in half_life.items() if since > 3500) > 3 * min(half_life.values())


# losses


def test_losses_are_those_of_the_definition_written_out():
    random = draw()
    logits, ages = random.normal(size=(5, 7)), random.integers(500, size=(5, 7))
    tokens, target, own = random.integers(3, size=(5, 7)), random.integers(3, size=5), np.log(random.random(5))
    losses = rate_losses(logits, ages, tokens, target, own, RATES, base=0.2)
    for n, (j, h) in itertools.product(range(5), enumerate(RATES)):
        weight = np.exp(logits[n]) * 2.0 ** (-ages[n] / h)
        p = 0.8 * weight[tokens[n] == target[n]].sum() / weight.sum() + 0.2 * np.exp(own[n])
        assert_allclose(losses[n, j], -np.log2(p))


def test_losses_are_finite_and_without_blocks_the_models_own():
    logits = np.array([[-np.inf, -np.inf], [0, -np.inf], [700, -700]])
    losses = rate_losses(
        logits, np.full((3, 2), 10**9), np.ones((3, 2), int), np.zeros(3, int), np.log([0.5] * 3), RATES
    )
    assert_allclose(losses, [[1] * J, [-math.log2(0.05)] * J, [-math.log2(0.05)] * J])
    empty = rate_losses(np.zeros((2, 0)), np.zeros((2, 0)), np.zeros((2, 0)), np.zeros(2), np.log([0.5, 0.25]), RATES)
    assert_allclose(empty, [[1] * J, [2] * J])


def test_losses_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="finite"):
        Decay().update(np.full((1, J), np.inf))


# scores


def test_scores_are_the_mixture_of_what_each_half_life_attends_to():
    random = draw()
    decay = after(switching(100, 30), random.integers(4, size=100), clusters=4)
    logits, ages, cluster = (
        random.normal(size=(6, 9)) * 3,
        random.integers(4000, size=(6, 9)),
        random.integers(4, size=6),
    )
    logits[2, 3:] = -np.inf
    logits[3] = -np.inf
    scores = decay.scores(logits, ages, cluster)
    for n in (0, 1, 2, 4, 5):
        each = [np.exp(logits[n]) * 2.0 ** (-ages[n] / h) for h in RATES]
        mixed = sum(np.exp(w) * e / e.sum() for w, e in zip(decay.log_weights(cluster[n]), each, strict=True))
        assert_allclose(np.exp(scores[n]), mixed * np.exp(logits[n]).sum(), rtol=1e-9)
    assert np.isneginf(scores[3]).all()


def test_scores_of_blocks_of_one_age_are_their_logits():
    logits = draw().normal(size=(3, 9))
    assert_allclose(after(switching(100, 30)).scores(logits, np.full((3, 9), 1234)), logits)


def test_the_mixture_falls_with_age_from_one():
    decay = after(switching(100, 30))
    mixture = np.exp(decay.log_mixture(np.arange(20000)))
    assert_allclose(mixture[0], 1)
    assert (np.diff(mixture) < 0).all()
    weights = np.exp(decay.log_weights())
    assert_allclose(mixture[777], sum(w * 2.0 ** (-777 / h) for w, h in zip(weights, RATES, strict=True)))


def test_the_half_life_is_where_the_mixture_is_one_half():
    decay = after(switching(150, 30))
    assert_allclose(np.exp(decay.log_mixture(np.array([decay.half_life]))), 0.5)


# what has faded


def fast() -> Decay:
    losses = np.full((50, J), 5.0)
    losses[:, -1] = 0
    return after(losses)


def test_what_has_faded_goes_to_disk_then_after_its_grace_period_and_comes_back():
    ages, new = np.array([0, 299, 301, 5000]), np.full(4, -1)
    first = fast().demoted(ages, new)
    assert_array_equal(first.since, [-1, -1, 301, 5000])
    assert_array_equal(first.disk, [False, False, True, True])
    assert not first.gone.any()
    later = fast().demoted(ages + 3000, first.since)
    assert_array_equal(later.gone, [False, False, True, True])
    assert_array_equal(later.disk, [True, True, False, False])
    back = Decay().demoted(ages + 3000, later.since)
    assert_array_equal(back.since, [-1] * 4)
    assert not (back.disk | back.gone).any()


def test_asked_again_it_says_the_same():
    ages, since = draw().integers(9000, size=100), np.full(100, -1.0)
    for step in (0, 100, 2500, 4000):
        once = fast().demoted(ages + step, since)
        twice = fast().demoted(ages + step, once.since)
        for a, b in zip(once, twice, strict=True):
            assert_array_equal(a, b)
        assert not (once.disk & once.gone).any()
        since = once.since


def test_nothing_fades_while_an_infinite_half_life_has_a_say():
    assert not Decay().demoted(np.array([10**9]), np.array([-1])).disk.any()
    assert not fast().demoted(np.array([10**9]), np.array([-1]), np.array([3])).disk.any()  # a cluster never seen


# exploration, clusters


def test_exploration_is_one_in_a_hundred_and_the_same_in_every_replay():
    chosen = DecayPolicy(seed=3).explores(np.arange(200_000))
    assert 0.009 < chosen.mean() < 0.011
    assert_array_equal(chosen[500:600], DecayPolicy(seed=3).explores(np.arange(500, 600)))
    assert (chosen != DecayPolicy(seed=4).explores(np.arange(200_000))).any()
    assert not DecayPolicy(exploration=0).explores(np.arange(1000)).any()
    assert_array_equal(np.flatnonzero(DecayPolicy().explores(np.arange(400))), EXPLORED)
    assert bool(DecayPolicy().explores(np.int64(EXPLORED[0])))


EXPLORED = [6, 123, 318]  # for ever: a replay of years ago explores where it did


def test_clusters_are_those_of_nearby_keys():
    keys = draw().normal(size=(2000, 32)).astype(np.float32)
    cluster = clusters_of(keys, 64)
    counts = np.bincount(cluster, minlength=64)
    assert len(counts) == 64
    assert counts.min() > 5
    near = clusters_of(keys + 0.1 * draw(1).normal(size=keys.shape), 64)
    assert (cluster == near).mean() > 0.7
    assert_array_equal(clusters_of(3 * keys[None, :5], 64), cluster[None, :5])
    with pytest.raises(ConfigError, match="even"):
        clusters_of(keys, 7)


# files, settings


def test_json_round_trip_is_exact():
    decay = after(switching(100, 30), draw().integers(4, size=100), clusters=4, seed=5)
    again = Decay.from_dict(json.loads(json.dumps(decay.to_dict(), allow_nan=False)))
    assert again.policy == decay.policy
    assert_array_equal(again.rates, decay.rates)
    assert_array_equal(again.trust, decay.trust)
    none = after(switching(10, 3), clusters=0)
    assert_array_equal(Decay.from_dict(none.to_dict()).rates, none.rates)


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("rates"),
        lambda fields: fields["rates"].pop(),
        lambda fields: fields["policy"].update(colour="red"),
        lambda fields: fields["policy"].update(share=2),
        lambda fields: fields.update(policy=None),
    ],
)
def test_what_is_damaged_is_refused(damage):
    fields = Decay().to_dict()
    damage(fields)
    with pytest.raises(StateError, match="decay"):
        Decay.from_dict(fields)


@pytest.mark.parametrize(
    "settings",
    [{"half_lives": []}, {"half_lives": [0]}, {"half_lives": [math.nan]}, {"share": 1}, {"share": -0.1},
     {"clusters": 3}, {"floor": math.nan}, {"grace": math.inf}, {"exploration": 1}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DecayPolicy(**settings)


# the alarm


def test_the_alarm_rings_after_a_change_and_not_without(caplog):
    calm, alarm = draw().normal(1, 0.3, 2000), DriftAlarm()
    with caplog.at_level(logging.WARNING, "bmojo.memory"):
        assert not alarm.update(calm)
        assert not caplog.records
        assert alarm.update(draw(1).normal(3, 0.3, 300))
    assert "drift at prediction 2" in caplog.records[0].message


# search


def store(blocks: int, dim: int = 8, layers: int = 1) -> MemoryEngine:
    engine, random = MemoryEngine(), draw(blocks)
    none = np.zeros((1, 1, dim), np.float32)
    for number in range(blocks):
        keys = random.normal(size=(2, dim)).astype(np.float32)
        engine.put([Block(number % layers, "s", 0, np.zeros(1, np.int32), none, none, keys, np.zeros(1, np.float32))])
    return engine


def by_hand(engine, layer, queries, count, generation, decay, ids_per_chunk=1):
    """All blocks scored, without bands."""
    found = engine.search(layer, queries, max(generation + 1, 1), generation=generation)
    score = decay.scores(found.score, (generation - found.id) // ids_per_chunk, decay.policy.cluster(queries))
    order = np.lexsort((-found.id, -score), axis=1)[:, :count]
    return np.take_along_axis(score, order, 1), np.take_along_axis(found.id, order, 1)


def test_bands_are_all_ids_once_and_end_at_the_half_lives():
    assert DecayPolicy().bands(500) == [(470, 500), (400, 470), (200, 400), (-1, 200)]
    assert DecayPolicy().bands(500, 10) == [(200, 500), (-1, 200)]
    assert DecayPolicy().bands(-1) == [(-1, -1)]


@pytest.mark.parametrize(("blocks", "layers"), [(0, 1), (1, 1), (25, 1), (150, 2), (150, 1)])
def test_reranked_equals_brute_force_where_bands_are_not_larger_than_count(blocks, layers):
    engine, queries = store(blocks, layers=layers), draw(1).normal(size=(4, 8)).astype(np.float32)
    decay = after(switching(100, 30), draw().integers(64, size=100))
    generation = blocks - 1 - blocks // 10
    got = reranked(engine, layers - 1, queries, 80, generation, decay, ids_per_chunk=layers)
    score, ids = by_hand(engine, layers - 1, queries, 80, generation, decay, layers)
    width = score.shape[1]
    assert_array_equal(got.id[:, :width], ids)
    assert_allclose(got.score[:, :width], score, rtol=1e-5)
    assert (got.id[:, width:] == -1).all()


def test_on_disk_the_same_is_found_and_the_weights_are_kept(tmp_path):
    queries, decay = draw(1).normal(size=(4, 8)).astype(np.float32), after(switching(100, 30))
    memory = store(150)
    with open_store(tmp_path / "store", mode="a", engine="sqlite", publish=0) as engine:
        engine.put(list(memory.scan()))
        engine.note("decay", **decay.to_dict())
    with open_store(tmp_path / "store") as engine:
        again = Decay.from_dict({name: engine.sources()["decay"][name] for name in ("policy", "rates", "trust")})
        got, expected = (reranked(e, 0, queries, 60, 149, d) for e, d in ((engine, again), (memory, decay)))
        assert_array_equal(got.id, expected.id)
        assert_allclose(got.score, expected.score, atol=1e-2)  # the index is of half precision


def test_reranked_without_decay_is_the_search():
    engine, queries = store(700), draw(1).normal(size=(6, 8)).astype(np.float32)
    decay = after(np.ones((5, 3)), half_lives=[math.inf] * 3)
    got, found = reranked(engine, 0, queries, 4, 600, decay), engine.search(0, queries, 4, generation=600)
    assert_array_equal(got.id, found.id)
    assert_allclose(got.similarity, found.score)
    assert_allclose(got.score, found.score, rtol=1e-6)


def test_reranked_finds_most_of_the_best_where_bands_are_larger_than_count():
    engine, queries = store(2500), 2 * draw(1).normal(size=(24, 8)).astype(np.float32)
    for decay in (Decay(), fast(), after(switching(150, 30))):
        got = reranked(engine, 0, queries, 16, 2499, decay).id
        _, best = by_hand(engine, 0, queries, 16, 2499, decay)
        assert all(len(set(row)) == 16 for row in got)
        assert np.mean([len({*a} & {*b}) for a, b in zip(got, best, strict=True)]) > 0.95 * 16


def test_reranked_by_similarity_alone_where_it_explores():
    engine, queries = store(300), draw(1).normal(size=(3, 8)).astype(np.float32)
    positions = np.array([EXPLORED[0], EXPLORED[0] + 1, EXPLORED[1]])
    got = reranked(engine, 0, queries, 5, 299, fast(), positions=positions)
    found = engine.search(0, queries, 5, generation=299)
    assert_array_equal(got.id[[0, 2]], found.id[[0, 2]])
    assert_array_equal(got.score[[0, 2]], got.similarity[[0, 2]])
    assert (got.id[1] != found.id[1]).any()
    assert got.id[1].min() > 200
