"""What is counted without building the model is what the model has."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cases import FAMILIES, any_config, configs, make_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bmojo import presets
from bmojo.nn import count, mixer
from bmojo.nn.model import BMojoLM
from bmojo.ops.attention import attend_naive


def real_parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in BMojoLM(config).parameters())


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_parameters_of_drawn_configurations(family, data):
    config = data.draw(configs(family))
    assert count.parameters(config) == real_parameters(config)


@given(any_config())
def test_state_bytes_of_drawn_configurations(config):
    model = make_model(config, dtype=torch.float32)
    with torch.no_grad():
        _, state = model(torch.zeros(1, 17, dtype=torch.int64))
    assert state.layer_nbytes() == [count.layer_state_bytes(config, kind, 17) for kind in config.kinds]
    layers, whole = count.costs(config, [17])
    assert whole.state_bytes == [state.nbytes] == [sum(layer.state_bytes[0] for layer in layers)]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [(preset, {}) for preset in presets.PRESETS]
    + [
        ("bmojo", {"tie_sources": False, "num_kv_heads": 2, "qk_norm": True}),
        ("bmojo_f", {"tie_sources": False, "qkv_bias": True}),
        ("bmojo", {"fading": "summary", "innovation": "ema"}),
        ("bmojo", {"innovation": "head", "eidetic_slots": 128}),
        ("bmojo", {"ssm": "gdn", "intermediate_size": 0}),
        ("bmojo", {"ssm": "s6", "ssm_expand": 2, "innovation": "state"}),
        ("hybrid", {"window": None, "ssm_groups": 4}),
        ("gdn", {"ssm_groups": 1}),
    ],
)
def test_flops_are_near_what_a_forward_pass_spends(preset, changes):
    config = presets.get(preset, "tiny", **changes)
    model, time = BMojoLM(config), 256
    # the counter does not see inside PyTorch's fused attention on a CPU
    with torch.no_grad(), mock.patch.object(mixer, "attend", attend_naive), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, time, dtype=torch.int64))
    counted = sum(count.costs(config, list(range(time)))[1].flops)
    assert abs(counter.get_total_flops() / counted - 1) < 0.3  # blocks hold up to a chunk that a query does not see
