"""All that a call makes is on the device and of the type of its inputs, whatever PyTorch's defaults are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import FAMILIES, configs, draw_tokens, make_model, partitions, run_calls, small_preset
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo.memory.state import MemoryState
from bmojo.ops import innovation
from bmojo.ops.dispatch import use_backend


@contextmanager
def other_defaults() -> Iterator[None]:
    """A tensor made without a device has no values here, one made without a dtype is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def identical(got: MemoryState, expected: MemoryState) -> None:
    for a, b in zip(got.layers, expected.layers, strict=True):
        for name in b:
            assert a[name].device == b[name].device, name
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(data=st.data())
def test_a_model_stays_on_its_device_and_in_its_dtype(family, backend, data):
    model = make_model(data.draw(configs(family)), dtype=torch.float32)
    time = data.draw(st.integers(1, 17))
    tokens, lengths = draw_tokens(2, time), data.draw(partitions(time))
    given = {}
    if data.draw(st.booleans()):
        given["mask"] = draw_tokens(2, time, 1) > 2
    if data.draw(st.booleans()):
        given["document_ids"] = (draw_tokens(2, time, 2) < 2).cumsum(1)
    with torch.no_grad(), use_backend(backend):
        expected, end, _ = run_calls(model, tokens, lengths, **given)
        step, after = model(tokens[:, :1], end)
        with other_defaults():
            got, state, _ = run_calls(model, tokens, lengths, **given)
            next_step, next_state = model(tokens[:, :1], end)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert torch.equal(next_step, step)
    identical(state, end)
    identical(next_state, after)


@pytest.mark.parametrize("kind", ["recent", "first", "random"])
def test_scores_of_positions_are_float32(kind):
    position = torch.arange(5)
    with other_defaults():
        score = innovation.position_score(kind, position, 0)
    assert score.dtype == torch.float32
    assert torch.equal(score, innovation.position_score(kind, position, 0))


def test_rows_are_selected_where_the_state_is():
    state = make_model(small_preset("bmojo"), dtype=torch.float32).empty_state(3)
    with other_defaults():
        chosen = state.select([2, 0])
    identical(chosen, state.select(torch.tensor([2, 0])))


def test_a_state_moves_as_a_whole():
    moved = make_model(small_preset("bmojo")).empty_state(1).to("meta", torch.float32)
    assert {z.device.type for layer in moved.layers for z in layer.values()} == {"meta"}
    assert moved.layers[0]["k"].dtype == torch.float32
    assert moved.layers[0]["rls_A"].dtype == torch.float64
