"""What float32 and bfloat16 cost, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    FAMILIES,
    configs,
    draw_tokens,
    make_model,
    partitions,
    run_calls,
)
from hypothesis import given
from hypothesis import strategies as st

from bmojo.nn.model import BMojoLM

FLOAT32 = 1e-5
BFLOAT16 = 4.0  # times the noise of one rounding of every weight
EXACT_ENTRIES = {"ssm", "slot_score", "pending", "rls_A", "rls_M", "ema"}


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_in_float32_the_forms_agree_to_1e_5(family, data):
    model = make_model(data.draw(configs(family)), dtype=torch.float32)
    time = data.draw(st.integers(1, 27))
    tokens = draw_tokens(2, time, data.draw(st.integers(0, 9)))
    with torch.no_grad():
        whole, _, trace = run_calls(model, tokens, [time])
        for lengths in ([1] * time, data.draw(partitions(time))):
            got, _, other = run_calls(model, tokens, lengths)
            for a, b in zip(other.kept, trace.kept, strict=True):
                assert torch.equal(a, b)
            assert rms(got - whole) <= FLOAT32 * rms(whole)


def nudged(model: BMojoLM, seed: int) -> BMojoLM:
    """The model with every weight off by about one rounding to bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + 2.0**-8 * noise)
    return other


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_bfloat16_costs_what_rounding_the_weights_would(family, data):
    """Computing in bfloat16 moves the logits no further than a few times what noise of one rounding on the weights of
    the float64 model does: nothing inside makes it worse. Rows that then choose other slots are left out."""
    rounded = make_model(data.draw(configs(family)), dtype=torch.bfloat16)
    exact = make_model(rounded.config)
    exact.load_state_dict(rounded.state_dict())
    tokens = draw_tokens(4, data.draw(st.integers(1, 27)), data.draw(st.integers(0, 9)))
    with torch.no_grad():
        expected, _, chosen = run_calls(exact, tokens, [tokens.shape[1]])
        got, state, trace = run_calls(rounded, tokens, [tokens.shape[1]])
        around = [run_calls(nudged(exact, seed), tokens, [tokens.shape[1]]) for seed in range(4)]
    assert got.isfinite().all()
    assert all(layer[name].dtype == torch.float32 for layer in state.layers for name in layer.keys() & EXACT_ENTRIES)
    same = torch.ones(4, dtype=torch.bool)
    for other in (trace, *(trace for _, _, trace in around)):
        for a, b in zip(chosen.kept, other.kept, strict=True):
            same &= (a.sort().values == b.sort().values).all(1)
    if same.any():
        noise = max(rms((logits - expected)[same]) for logits, _, _ in around)
        assert rms((got - expected)[same]) <= BFLOAT16 * noise
