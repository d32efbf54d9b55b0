"""The corners of the family."""

from __future__ import annotations

import pytest
import torch

from bmojo import presets
from bmojo.errors import ConfigError
from bmojo.nn import count
from bmojo.nn.model import BMojoLM


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("size", presets.SIZES)
def test_presets_of_one_size_have_the_same_parameters(size, preset):
    config, transformer = presets.get(preset, size), presets.transformer(size)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in BMojoLM(config).parameters())
    assert parameters == count.parameters(config)
    tolerance = (
        0.02 if preset not in ("mamba", "mamba2") or size in ("tiny", "mini") else 0.05
    )  # the papers' Mambas are as they are
    assert abs(parameters / count.parameters(transformer) - 1) < tolerance
    assert config.hidden_size == transformer.hidden_size
    assert config.num_layers == transformer.num_layers * (2 if tolerance > 0.02 else 1)


@pytest.mark.parametrize("changes", [{"vocab_size": 1000}, {"hidden_size": 256}, {"num_layers": 4}, {"num_kv_heads": 2},
                                     {"tie_embeddings": False, "qk_norm": True}])  # fmt: skip
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_they_stay_equal_when_what_they_share_changes(preset, changes):
    target = count.parameters(presets.transformer("tiny", **changes))
    assert abs(count.parameters(presets.get(preset, "tiny", **changes)) / target - 1) < 0.02


def test_what_the_corners_are():
    get = {name: presets.get(name) for name in presets.PRESETS}
    assert {name: set(config.kinds) for name, config in get.items()} == {
        "transformer": {"attention"}, "swa": {"attention"}, "mamba": {"ssm"}, "mamba2": {"ssm"},
        "gdn": {"ssm"},
        "hybrid": {"ssm", "attention"}, "bmojo_f": {"bmojo"}, "bmojo": {"bmojo"},
    }  # fmt: skip
    assert get["transformer"].window is None
    assert get["swa"].window == get["hybrid"].window == 64
    assert (get["mamba"].ssm, get["mamba2"].ssm, get["gdn"].ssm) == ("s6", "ssd", "gdn")
    assert get["gdn"].ssm_groups == get["gdn"].ssm_heads
    assert (get["bmojo_f"].fading_span, get["bmojo_f"].eidetic_slots) == (64, 0)
    assert (get["bmojo"].fading_span, get["bmojo"].eidetic_slots) == (64, 32)
    for config in (presets.mamba("130m"), presets.mamba2("130m")):
        assert (config.intermediate_size, config.num_layers) == (0, 24)
    assert presets.mamba("130m").ssm_state_size == 16


def test_changes_are_kept():
    config = presets.bmojo("tiny", window=128, intermediate_size=100, eidetic_slots=7)
    assert (config.window, config.fading_span, config.intermediate_size, config.eidetic_slots) == (128, 128, 100, 7)
    assert presets.bmojo("tiny", fading_span=0).fading_span == 0
    assert presets.gdn("tiny", ssm_head_dim=16).ssm_groups == 8


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'bmojo_f'"):
        presets.get("bmojo-f")
    with pytest.raises(ConfigError, match="did you mean '130m'"):
        presets.bmojo("130")
    with pytest.raises(ConfigError, match="did you mean 'window'"):
        presets.swa("tiny", windo=64)


@pytest.mark.parametrize(("name", "pattern"), [("hybrid", "attention"), ("mamba2", "attention"), ("swa", "ssm")])
def test_a_memory_that_its_knob_does_not_change_cannot_be_sized(name, pattern):
    with pytest.raises(ConfigError, match="can't be sized"):
        presets.at_state(name, "tiny", 200_000, pattern=(pattern,), window=64)
