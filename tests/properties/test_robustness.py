"""What must not matter: the chunk of the computation, memory that nobody wrote, gradient checkpointing, compilation."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FAMILIES,
    canonical,
    close,
    configs,
    draw_tokens,
    make_model,
    partitions,
    run_calls,
    same_state,
    simplest,
    small_preset,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bmojo.memory.spec import layer_spec
from bmojo.memory.state import MemoryState
from bmojo.nn.loss import auxiliary_loss
from bmojo.nn.mixer import Trace
from bmojo.presets import PRESETS


@pytest.mark.parametrize("family", ["attention", "full attention", "ssd", "gdn", "s6", "bmojo without slots"])
@given(data=st.data())
def test_a_chunk_that_no_memory_counts_in_does_not_matter(family, data):
    """Eidetic sets and summaries are refreshed once a chunk; for all else a chunk is but a way of computing."""
    config = data.draw(configs(family)).replace(fading="window", chunk_size=1)
    model = make_model(config)
    span = [config.window or 12, config.fading_span]
    divisors = [c for c in range(2, 13) if all(size % c == 0 for size in span)]
    tokens = draw_tokens(2, data.draw(st.integers(1, 27)))
    with torch.no_grad():
        expected, end = model(tokens)
        for chunk in divisors:
            other = make_model(config.replace(chunk_size=chunk))
            got, state = other(tokens)
            close(got, expected, message=f"chunk {chunk}")
            same_state(state, end)


def spoiled(state: MemoryState) -> MemoryState:
    """The state with numbers in every place that no token has written yet, or that holds an empty slot."""
    layers = []
    for kind, layer in zip(state.config.kinds, state.layers, strict=True):
        layer = {name: tensor.clone() for name, tensor in layer.items()}
        written = {"k": layer["position"], "v": layer["position"]}
        entries = layer["position"] // state.config.fading_stride
        written |= {"fading_k": entries, "fading_v": entries}
        for name in layer.keys() & written.keys():
            rows = torch.arange(layer[name].shape[1])
            layer[name][rows >= written[name][:, None]] = 1e9
        if "slot_position" in layer:
            empty = layer["slot_position"] < 0
            for name in ("slot_k", "slot_v", "slot_score"):
                layer[name][empty] = 1e9
        if "pending" in layer:
            done = torch.arange(state.config.chunk_size) >= (layer["position"] % state.config.chunk_size)[:, None]
            layer["pending"][done] = 1e9
        assert layer.keys() == layer_spec(state.config, kind).keys()
        layers.append(layer)
    return MemoryState(state.config, tuple(layers))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_places_of_a_state_that_no_token_wrote_are_never_read(family, data):
    model = make_model(data.draw(configs(family)))
    tokens, more = draw_tokens(2, data.draw(st.integers(1, 19))), draw_tokens(2, 9, 1)
    lengths = data.draw(partitions(9))
    with torch.no_grad():
        _, state = model(tokens)
        for start in (state, model.empty_state(2)):
            expected, end, _ = run_calls(model, more, lengths, start)
            got, spoiled_end, _ = run_calls(model, more, lengths, spoiled(start))
            close(got, expected)
            for a, b in zip(spoiled_end.layers, end.layers, strict=True):
                assert torch.equal(a["position"], b["position"])
                for name in a.keys() & {"ssm", "rls_A", "rls_M", "ema", "slot_position"}:
                    close(canonical(a)[name], canonical(b)[name], message=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_that_was_allocated_without_values_is_never_read(family, monkeypatch):
    """`torch.empty` and its kin give NaN here."""

    def poisoned(make):
        def run(*args, **kwargs) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return run

    config = simplest(family)
    model = make_model(config)
    tokens = draw_tokens(2, 23)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :5] = mask[1, 20:] = False
    with torch.no_grad():
        expected = [run_calls(model, tokens, lengths, mask=mask) for lengths in ([23], [7, 1, 15])]
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
            for name in names:
                monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
        fresh = make_model(config)
        for lengths, (logits, state, _) in zip(([23], [7, 1, 15]), expected, strict=True):
            got, end, _ = run_calls(fresh, tokens, lengths, mask=mask)
            close(got, logits)
            same_state(end, state)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_gradient_checkpointing_gives_the_same_loss_gradients_and_notes(family, data):
    model = make_model(data.draw(configs(family))).train()
    tokens = draw_tokens(2, data.draw(st.integers(1, 19)))

    def run() -> tuple[Tensor, Trace, dict[str, Tensor | None]]:
        trace = Trace()
        model.zero_grad(set_to_none=True)
        loss = model(tokens, trace=trace)[0].square().sum()
        loss = loss + auxiliary_loss(trace)
        loss.backward()
        return loss, trace, {name: p.grad for name, p in model.named_parameters()}

    loss, trace, gradients = run()
    model.gradient_checkpointing = True
    again, noted, others = run()
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None), name
        if gradient is not None:
            assert torch.equal(gradient, others[name]), name
    for a, b in zip(trace.innovation + trace.kept, noted.innovation + noted.kept, strict=True):
        assert torch.equal(a, b)
    assert len(trace.losses) == len(noted.losses)


@pytest.mark.parametrize("preset", PRESETS)
def test_prime_lengths_and_those_beside_chunk_and_window(preset):
    """Values and gradients of one call are those of any two."""
    config = (
        small_preset(preset, window=12)
        if preset not in ("transformer", "mamba", "mamba2", "gdn")
        else small_preset(preset)
    )
    model = make_model(config)
    for time in (1, 2, 3, 4, 5, 7, 11, 12, 13, 17, 23, 24, 25, 29, 31, 37):
        tokens = draw_tokens(2, time, time)
        model.zero_grad(set_to_none=True)
        whole, _, _ = run_calls(model, tokens, [time])
        whole.square().sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        if time == 1:
            continue
        model.zero_grad(set_to_none=True)
        parts, _, _ = run_calls(model, tokens, [time // 2, time - time // 2])
        parts.square().sum().backward()
        close(parts, whole, message=f"length {time}")
        for name, parameter in model.named_parameters():
            if expected[name] is not None:
                close(parameter.grad, expected[name], message=f"length {time}, {name}")
