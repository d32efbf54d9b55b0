"""Decay in what a layer reads from storage: the same for any cutting of a stream; what is new outweighs what is old."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import close, draw_tokens
from test_storage import small, storage_of

from bmojo.errors import ConfigError, StateError
from bmojo.memory.decay import Decay, DecayPolicy, rate_losses
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.faded import Faded, biased_keys, biased_queries
from bmojo.memory.storage import Mark
from bmojo.memory.store import Store
from bmojo.ops.attention import attend_naive

FAST = DecayPolicy(half_lives=(np.inf, 8, 2), clusters=0, exploration=0.1)  # a hundred tokens are some half-lives
CASES = {
    "bmojo": {},
    # keys of layer 0 would be those of the tokens alone, and blocks alike up to the rounding of a store to float32
    "plain keys": {"conv_size": 0, "storage_layers": (1,)},
    "true positions": {"positions": "true"},
    "untied": {"tie_sources": False},
    "stride 8": {"storage_stride": 8},
    "long blocks": {"storage_block": 16},
    "one layer": {"storage_layers": (1,)},
}


@pytest.mark.parametrize("stored", [False, True], ids=["own", "store"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_any_cutting_of_a_stream_gives_the_same(case, stored):
    model = small("bmojo", **CASES[case])
    tokens, engine = draw_tokens(2, 150), MemoryEngine()
    if stored:
        other = storage_of(model, store=Store(engine), sources=["other"])
        model(draw_tokens(1, 200, seed=1), storage=other)
        other.store.flush()

    def session(decay=True):
        store = Store(engine, publish=1e9) if stored else None
        replay = [(0, engine.pin(), (0, 0))] if stored else None
        return storage_of(model, 2, store=store, replay=replay, decay=decay and Decay(FAST))

    whole = session()
    expected = model(tokens, storage=whole)[0]
    assert (expected - model(tokens, storage=session(False))[0]).abs().max() > 1e-3
    assert np.ptp(np.exp(whole.layers[1].faded[0].decay.log_weights())) > 0.01
    tolerance = 1e-5 if stored else 1e-9
    for sizes in ([1] * 150, [37, 1, 1, 13, 98], [3, 29, 1, 64, 3, 50], [149, 1]):
        storage, state, found = session(), None, []
        for part in tokens.split(sizes, 1):
            logits, state = model(part, state, storage=storage)
            found.append(logits)
            again = session(False)  # a mark brings its own
            again.back(Mark.from_tensors(storage.mark().to_tensors(), again.store))
            storage = again
        close(torch.cat(found, 1), expected, tolerance, str(sizes[:3]))
        for layer, kept in storage.layers.items():
            for mine, theirs in zip(kept.faded, whole.layers[layer].faded, strict=True):
                np.testing.assert_allclose(mine.decay.rates, theirs.decay.rates, atol=tolerance)
                np.testing.assert_allclose(mine.bias, theirs.bias, atol=tolerance)


@torch.no_grad()
def test_a_bias_is_added_to_the_logits():
    q, k, v, bias = (torch.randn(2, *n, dtype=torch.float64) for n in ((5, 3, 8), (7, 3, 8), (7, 3, 4), (7,)))

    def attend(q, *z):
        return attend_naive(q.transpose(1, 2), *(part.transpose(1, 2) for part in z))

    logits = torch.einsum("nqhp,nkhp->nhqk", q, k) * 8**-0.5 + bias[:, None, None]
    close(attend(biased_queries(q), biased_keys(k, bias), v), logits.softmax(-1) @ v.transpose(1, 2), 1e-12)
    close(attend(biased_queries(q), biased_keys(k), v), attend(q, k, v), 1e-12)


@pytest.mark.parametrize("case", ["bmojo", "untied"])
@torch.no_grad()
def test_without_decay_nothing_changes(case):
    """One infinite half-life is no decay: the same blocks, no bias."""
    model, tokens = small("bmojo", **CASES[case]), draw_tokens(2, 100)
    never = Decay(DecayPolicy(half_lives=(np.inf,), clusters=0))
    expected = model(tokens, storage=storage_of(model, 2))[0]
    close(model(tokens, storage=storage_of(model, 2, decay=never))[0], expected, 1e-12)


def test_what_is_new_is_chosen_and_weighs_more_once_the_world_is_known_to_move():
    """An old value and a new one under the same key, and others of little likeness."""
    ages, similarity = np.array([400, 350, 300, 2, 1]), np.array([5.0, 5.0, 5.0, 5.0, 0.0])
    votes = torch.tensor([[1], [1], [1], [2], [9]])
    logits = torch.tensor(similarity).view(1, 1, 5, 1)

    def after(token: int) -> Faded:
        faded = Faded(Decay(DecayPolicy(clusters=0, exploration=0)))
        for begin in range(60):
            index, faded = faded.choose(similarity, ages, faded.bands(ages), 5, begin)
            faded = faded.learn(logits[:, :, index], votes[index], torch.tensor([token]), 64)
        return faded

    for token in (1, 2):  # the old value comes, or the new one
        faded = after(token)
        index, faded = faded.choose(similarity, ages, faded.bands(ages), 2, 0)
        assert index[0] == 3
        weight = np.exp(similarity[index] + faded.bias)
        if token == 2:
            assert faded.decay.half_life < 100
            assert weight[0] > 50 * weight[1]
        else:
            assert faded.decay.half_life > 300
            assert weight[0] < 1.3 * weight[1]
    assert Faded.from_dict(faded.to_dict()).bias == faded.bias
    with pytest.raises(StateError, match="damaged"):
        Faded.from_dict({"age": [1]})


def test_heads_and_tokens_vote_by_their_logits():
    """The losses are those of `rate_losses` over every head and token."""
    torch.manual_seed(0)
    logits, votes = torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.randint(0, 6, (4, 5))
    votes[1, 3:] = -1
    targets = torch.tensor([1, -1, 4])  # one is not known
    faded = Faded(Decay(FAST), age=(0, 3, 9, 40), bias=(0,) * 4)
    each = logits.masked_fill((votes < 0)[None, None], -torch.inf).flatten(1)[[0, 2]].numpy()
    ages, tokens = (np.tile(z, 2) for z in (np.repeat(faded.age, 5), votes.flatten().numpy()))
    losses = rate_losses(each, ages, tokens, np.array([1, 4]), np.full(2, -np.log(32)), FAST.half_lives)
    expected = Decay(FAST).update(losses.sum(0, keepdims=True))[0]
    np.testing.assert_allclose(faded.learn(logits, votes, targets, 32).decay.rates, expected.rates, rtol=1e-12)
    nothing = Faded(Decay(FAST)).learn(logits[:, :, :0], votes[:0], targets, 32)
    np.testing.assert_array_equal(nothing.decay.rates, Decay(FAST).rates)


@torch.no_grad()
def test_replays_forks_and_the_store_remember():
    model, tokens = small("bmojo"), draw_tokens(1, 120)
    store, pins, found, state = Store(MemoryEngine(), publish=0), [], [], None
    model(draw_tokens(1, 60, seed=1), storage=storage_of(model, store=store, sources=["other"]))
    store.flush()
    storage = storage_of(model, store=store, sources=["a"], record=pins, decay=Decay(FAST))
    for part in tokens.split(17, 1):
        logits, state = model(part, state, storage=storage)
        found.append(logits)
        store.flush()
    more = draw_tokens(1, 20, seed=3)
    store.publish = 1e9
    close(model(more, state, storage=storage.fork())[0], model(more, state, storage=storage)[0], 1e-5, "fork")
    again, state = storage_of(model, store=store, sources=["a"], replay=pins, decay=Decay(FAST)), None
    for part, expected in zip(tokens.split(17, 1), found, strict=True):
        logits, state = model(part, state, storage=again)
        assert torch.equal(logits, expected)
    store.flush()
    learned = {layer: kept.faded[0].decay for layer, kept in storage.layers.items()}
    new = storage_of(model, store=Store(store.engine), sources=["b"], decay=True)
    for layer, decay in learned.items():
        np.testing.assert_array_equal(new.layers[layer].faded[0].decay.rates, decay.rates)
    assert Store(store.engine).stats()["half_life"] == {n: decay.half_life for n, decay in learned.items()}
    assert storage_of(model, store=Store(MemoryEngine()), decay=True).half_life[0] > 100
    assert storage_of(model).half_life == []


def test_what_decay_needs_is_said():
    with pytest.raises(ConfigError, match="keep=False"):
        storage_of(small("bmojo"), keep=False, decay=True)
    with pytest.raises(ConfigError, match="storage_stride"):
        storage_of(small("bmojo", storage_block=4, storage_stride=8), decay=True)


@torch.no_grad()
def test_what_is_deleted_in_the_middle_of_a_stride_is_gone_with_its_bias():
    model, tokens = small("bmojo"), draw_tokens(1, 90)
    store = Store(MemoryEngine(), publish=0)
    model(draw_tokens(1, 60, seed=1), storage=storage_of(model, store=store, sources=["other"]))
    store.flush()
    assert store.pin() > 0
    store.publish = 1e9  # the candidates of a band of age depend on the generation
    storage = storage_of(model, store=store, sources=["a"], decay=Decay(FAST))
    state = model(tokens[:, :50], storage=storage)[1]
    saved = storage.mark().to_tensors()
    assert any(block.source == "other" for kept in storage.layers.values() for block in kept.found[0])
    store.delete("other")
    expected = model(tokens[:, 50:], state, storage=storage)[0]
    again = storage_of(model, store=store, sources=["b"], write=False)
    again.restore(Mark.from_tensors(saved, store))
    for kept in again.layers.values():
        assert len(kept.found[0]) == len(kept.faded[0].bias) == len(kept.faded[0].age)
    close(model(tokens[:, 50:], state, storage=again)[0], expected, 1e-5)
