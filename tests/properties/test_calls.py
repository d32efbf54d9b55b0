"""Any way of cutting a sequence into calls gives the same logits and the same final state."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FAMILIES,
    any_config,
    close,
    configs,
    draw_tokens,
    make_model,
    partitions,
    run_calls,
    same_state,
    small_preset,
)
from hypothesis import given
from hypothesis import strategies as st

from bmojo.memory.state import MemoryState
from bmojo.ops.dispatch import use_backend
from bmojo.presets import PRESETS


def check_calls(model, tokens, lengths):
    with torch.no_grad():
        whole, state, trace = run_calls(model, tokens, [tokens.shape[1]])
        got, end, parts = run_calls(model, tokens, lengths)
    close(got, whole, message="logits")
    same_state(end, state)
    for a, b in zip(parts.innovation, trace.innovation, strict=True):
        close(a, b, message="innovation")
    for a, b in zip(parts.kept, trace.kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_parallel_equals_recurrent_equals_any_partition(family, data):
    model = make_model(data.draw(configs(family)))
    time = data.draw(st.integers(1, 27))
    tokens = draw_tokens(2, time, data.draw(st.integers(0, 9)))
    check_calls(model, tokens, [1] * time)
    check_calls(model, tokens, data.draw(partitions(time)))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_at_awkward_lengths(preset):
    config = small_preset(preset)
    chunk, window = config.chunk_size, config.window or 8
    model = make_model(config)
    for time in (1, chunk - 1, chunk, chunk + 1, window - 1, window, window + 1, 13, 31):
        tokens = draw_tokens(2, time, time)
        check_calls(model, tokens, [1] * time)
        if time > 2:
            check_calls(model, tokens, [time - 2, 2])


@given(data=st.data())
def test_kernels_chunked_and_naive_forms_agree(data):
    model = make_model(data.draw(any_config()))
    time = data.draw(st.integers(1, 23))
    tokens, lengths = draw_tokens(2, time), data.draw(partitions(time))
    with torch.no_grad():
        expected, state, _ = run_calls(model, tokens, lengths)
        for backend in ("chunked", "naive"):
            with use_backend(backend):
                got, end, _ = run_calls(model, tokens, lengths)
            close(got, expected)
            same_state(end, state)


@given(data=st.data())
def test_the_callers_state_is_left_alone_and_donating_it_changes_nothing(data):
    model = make_model(data.draw(any_config()))
    time = data.draw(st.integers(2, 19))
    tokens, lengths = draw_tokens(2, time), data.draw(partitions(time))
    with torch.no_grad():
        _, state, _ = run_calls(model, tokens, lengths)
        before = state.clone()
        for more in (draw_tokens(2, 1), draw_tokens(2, 9)):
            model(more, state)
            for layer, kept in zip(state.layers, before.layers, strict=True):
                assert all(torch.equal(layer[name], kept[name]) for name in kept)
        more = draw_tokens(2, 11)
        expected, end, _ = run_calls(model, more, [1] * 11, state)
        got, donated, _ = run_calls(model, more, [1] * 11, state.clone(), donate=True)
    assert torch.equal(got, expected)
    same_state(donated, end, 0)


@given(data=st.data())
def test_a_batch_equals_its_rows_alone(data):
    model = make_model(data.draw(any_config()))
    time = data.draw(st.integers(1, 19))
    tokens, lengths = draw_tokens(3, time), data.draw(partitions(time))
    with torch.no_grad():
        logits, state, _ = run_calls(model, tokens, lengths)
        for row in range(3):
            alone, end, _ = run_calls(model, tokens[row : row + 1], lengths)
            close(logits[row : row + 1], alone)
            same_state(state.select([row]), end)


@given(data=st.data())
def test_no_token_is_seen_before_its_time(data, monkeypatch):
    from bmojo.nn import mixer

    config = data.draw(any_config())
    model = make_model(config)
    time = data.draw(st.integers(2, 23))
    t = data.draw(st.integers(0, time - 1))
    tokens = draw_tokens(1, time)
    other = tokens.clone()
    other[0, t] = (other[0, t] + 1) % config.vocab_size
    sets: list[torch.Tensor] = []
    select = mixer.select

    def noted(*args, **kwargs):
        chosen = select(*args, **kwargs)
        sets.append(chosen[1])
        return chosen

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(mixer, "select", noted)
        before, after = model(tokens)[0], model(other)[0]
    close(after[:, :t], before[:, :t], 1e-12)
    assert not torch.allclose(after[:, t], before[:, t])
    chunks = t // config.chunk_size + 1  # up to the chunk of t, a set is made of tokens before t's chunk
    layers = len(sets) // 2
    for a, b in zip(sets[:layers], sets[layers:], strict=True):
        assert torch.equal(a[:, :chunks], b[:, :chunks])


@given(data=st.data())
def test_rows_of_a_state_can_be_reordered_and_repeated(data):
    model = make_model(data.draw(any_config()))
    tokens, more = draw_tokens(3, data.draw(st.integers(1, 13))), draw_tokens(4, 5, 1)
    rows = [2, 0, 0, 1]
    with torch.no_grad():
        _, state = model(tokens)
        expected, _ = model(more, model(tokens[rows])[1])
        close(model(more, state.select(rows))[0], expected)
        twice = state.repeat(2)
        assert twice.batch_size == 6
        assert isinstance(twice, MemoryState)
        again = draw_tokens(6, 3)
        close(model(again, twice)[0], model(again, state.select([0, 0, 1, 1, 2, 2]))[0])
