"""Memories of documents composed: the algebra against its definition, and the state against reading it all."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cases import EXACT, any_config, close, draw_tokens, make_model, same_state, simplest, small_preset
from hypothesis import given
from hypothesis import strategies as st

from bmojo.errors import StateError
from bmojo.memory.composition import ORDERS, compose, in_order, mean_of_orders, mean_of_rotations
from bmojo.memory.state import MemoryState

CORNERS = ["mamba2", "gdn", "mamba"]


def draw_maps(kind: str, documents: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    if kind == "matrix":
        return [(normal(2, 3, 3) / 2, normal(2, 3, 4)) for _ in range(documents)]
    shape = (2, 1, 1) if kind == "scalar" else (2, 3, 4)
    return [(-normal(*shape).exp(), normal(2, 3, 4)) for _ in range(documents)]


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "matrix"])
@pytest.mark.parametrize("documents", [1, 2, 3, 4, 5, 6])
def test_averages_are_those_of_the_orders(kind, documents):
    maps, matrix = draw_maps(kind, documents), kind == "matrix"
    every = [in_order(order, matrix=matrix) for order in itertools.permutations(maps)]
    turns = [in_order(maps[i:] + maps[:i], matrix=matrix) for i in range(documents)]
    for got, orders in ((mean_of_orders, every), (mean_of_rotations, turns)):
        for ours, theirs in zip(got(maps, matrix=matrix), zip(*orders, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(theirs).mean(0), atol=EXACT, rtol=0)


def test_the_quadrature_is_the_sum_of_elementary_symmetric_polynomials():
    documents = 40
    maps = draw_maps("scalar", documents)
    expected = 0
    for i, (_, h) in enumerate(maps):
        e = [torch.ones_like(maps[0][0])] + [torch.zeros_like(maps[0][0])] * (documents - 1)
        for j, (log, _) in enumerate(maps):
            if j != i:
                e = e[:1] + [here + log.exp() * before for before, here in itertools.pairwise(e)]
        expected = expected + sum(x / math.comb(documents - 1, m) for m, x in enumerate(e)) / documents * h
    torch.testing.assert_close(mean_of_orders(maps, matrix=False)[1], expected, atol=EXACT, rtol=0)


def read(model, tokens, state: MemoryState | None = None, **options) -> MemoryState:
    with torch.no_grad():
        return model(tokens, model.empty_state(len(tokens)).tracked() if state is None else state, **options)[1]


def without_tail(state: MemoryState) -> MemoryState:
    layers = tuple(
        {name: torch.zeros_like(z) if "conv" in name else z for name, z in layer.items()} for layer in state.layers
    )
    return dataclasses.replace(state, layers=layers)


@pytest.mark.parametrize("name", CORNERS)
def test_a_single_layer_composes_to_what_reading_on_gives(name):
    model = make_model(small_preset(name, num_layers=1))
    u, v, w = (draw_tokens(2, length, seed) for seed, length in enumerate((11, 3, 9)))
    expected = read(model, w, without_tail(read(model, v, without_tail(read(model, u)))))
    got = compose([read(model, z) for z in (u, v, w)])
    same_state(got, expected, EXACT)


@pytest.mark.parametrize("name", CORNERS)
def test_without_a_convolution_that_is_the_concatenation(name):
    model = make_model(small_preset(name, num_layers=1, ssm_conv=1))
    u, v = draw_tokens(2, 11), draw_tokens(2, 6, 1)
    same_state(compose([read(model, u), read(model, v)]), read(model, torch.cat((u, v), 1)), EXACT)


@pytest.mark.parametrize("name", [*CORNERS, "bmojo"])
def test_transitions_are_the_same_in_any_calls_and_with_padding(name):
    model = make_model(small_preset(name, **({"ssm": "gdn"} if name == "bmojo" else {})))
    tokens = draw_tokens(2, 14)
    whole = read(model, tokens)
    state = None
    for part in tokens.split([5, 1, 1, 7], 1):
        state = read(model, part, state)
    same_state(state, whole, EXACT)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, [0, 5, 16]] = mask[1, [1, 2, 9]] = False
    padded = torch.zeros(2, 17, dtype=tokens.dtype).masked_scatter(mask, tokens)
    same_state(read(model, padded, mask=mask), whole, EXACT)
    plain = read(model, tokens, model.empty_state(2))
    for tracked, layer in zip(whole.layers, plain.layers, strict=True):
        assert all(torch.equal(tracked[key], layer[key]) for key in layer)


composable = any_config().filter(lambda config: all(k == "ssm" or config.window_of(k) for k in config.kinds))


@given(composable, st.lists(st.integers(0, 17), min_size=3, max_size=3), st.integers(0, 2**16))
def test_grouping_does_not_matter_and_the_empty_document_is_nothing(config, lengths, seed):
    if config.fading == "summary":
        lengths = [length * config.chunk_size for length in lengths]
    model = make_model(config)
    empty = model.empty_state(1).tracked()
    u, v, w = (read(model, draw_tokens(1, length, seed + i)) if length else empty for i, length in enumerate(lengths))
    together = compose([u, v, w])
    assert int(together.position) == sum(lengths)
    same_state(compose([compose([u, v]), w]), together, EXACT)
    same_state(compose([u, compose([v, w])]), together, EXACT)
    same_state(compose([empty, u, empty]), u, 0)
    for order in ORDERS:
        same_state(compose([u], order), u, 0)
        on = read(model, draw_tokens(1, 9, seed), compose([u, v, w], order))
        assert int(on.position) == sum(lengths) + 9


@given(composable, st.permutations(range(4)), st.sampled_from(["cyclic", "all"]))
def test_averages_do_not_depend_on_the_order_of_the_documents(config, order, average):
    model = make_model(config)
    documents = [read(model, draw_tokens(1, 6 * config.chunk_size, seed)) for seed in range(4)]
    same_state(compose([documents[i] for i in order], average), compose(documents, average), 0)


def one_bmojo(innovation: str, **changes):
    """A layer whose keys and values are made of the token alone."""
    return make_model(simplest(innovation, fading_span=0, window=8, **{"admission": "innovation", **changes}))


@pytest.mark.parametrize("positions", ["true", "compact"])
@pytest.mark.parametrize("lengths", [(8, 9), (4, 20, 3), (12, 2), (4, 4, 4)])
def test_window_and_slots_are_those_of_the_concatenation(positions, lengths):
    model = one_bmojo("recent", positions=positions, eidetic_slots=7)
    documents = [draw_tokens(2, length, seed) for seed, length in enumerate(lengths)]
    composed = compose([read(model, tokens) for tokens in documents])
    expected = read(model, torch.cat(documents, 1))
    same_state(composed, expected)
    more = draw_tokens(2, 11, 9)
    close(model(more, composed)[0], model(more, expected)[0])


@pytest.mark.parametrize("lengths", [(7, 9), (5, 20, 3), (1, 2, 3), (13, 1)])
def test_documents_that_end_within_a_chunk(lengths):
    model = one_bmojo("recent", eidetic_slots=7)
    documents = [draw_tokens(1, length, seed) for seed, length in enumerate(lengths)]
    composed = compose([read(model, tokens) for tokens in documents])
    expected = read(model, torch.cat(documents, 1))
    same_state(composed, expected, skip=("pending", "slot_k", "slot_v", "slot_score", "slot_position"))
    more = draw_tokens(1, 11, 9)  # to the end of the chunk and beyond: every token has competed once
    same_state(read(model, more, composed), read(model, more, expected))


@pytest.mark.parametrize("name", ["rls", "ema"])
def test_statistics_of_innovation_fade(name):
    model = one_bmojo(name, innovation_forgetting=0.9)
    documents = [draw_tokens(2, length, seed) for seed, length in enumerate((8, 12))]
    got = compose([read(model, tokens) for tokens in documents]).layers[0]
    expected = read(model, torch.cat(documents, 1)).layers[0]
    for statistic in {"rls": ("rls_A", "rls_M"), "ema": ("ema",)}[name]:
        close(got[statistic], expected[statistic])


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_composed_by_themselves(order):
    model = make_model(small_preset("bmojo"))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    batch = [read(model, draw_tokens(2, 12, seed), mask=mask) for seed in range(3)]
    together = compose(batch, order)
    for row in range(2):
        same_state(together.select([row]), compose([state.select([row]) for state in batch], order), 0)


def test_a_tracked_state_is_saved_moved_and_read_on(tmp_path):
    model = make_model(small_preset("gdn"))
    state = read(model, draw_tokens(2, 9))
    state.save(tmp_path / "state")
    same_state(MemoryState.load(tmp_path / "state", model.config), state, 0)
    assert state.to(dtype=torch.bfloat16).layers[0]["transition"].dtype == torch.float64
    with pytest.raises(StateError, match="tracked from its first token on, got one that has read 9"):
        state.tracked()
    with pytest.raises(StateError, match="read each document from a state of its own"):
        read(model, draw_tokens(2, 3), document_ids=torch.zeros(2, 3, dtype=torch.int64))


def test_what_does_not_compose_is_refused_by_name():
    model = make_model(small_preset("mamba2"))
    state = read(model, draw_tokens(1, 5))
    plain = model(draw_tokens(1, 5))[1]
    hybrid = make_model(small_preset("hybrid", window=None))
    other = make_model(small_preset("mamba2", hidden_size=8))
    gdn = make_model(small_preset("gdn"))
    summary = make_model(small_preset("bmojo", fading="summary"))
    for states, order, message in (
        ([], "given", "nothing to compose"),
        ([state], "best", "unknown order 'best'"),
        ([state, plain], "given", r"layer 0 \(ssm\) has no transition .*empty_state\(\).tracked\(\)"),
        ([read(hybrid, draw_tokens(1, 5))], "given", r"layer 1 \(attention\) keeps the whole past"),
        ([state, read(other, draw_tokens(1, 5))], "given", "hidden_size is 16 here and 8 in the state"),
        ([state, state.repeat(2)], "given", r"one batch size, device and dtype, got \(1, .* and \(2, "),
        ([state, state.to(dtype=torch.bfloat16)], "given", "float64.*bfloat16"),
        ([read(gdn, draw_tokens(1, 5))] * 9, "all", "at most 8 documents of a gdn model.*order='cyclic'"),
        ([read(summary, draw_tokens(1, 5))] * 2, "given", r"whole chunks \(4 tokens\), got one of 5"),
    ):
        with pytest.raises(StateError, match=message):
            compose(states, order)
