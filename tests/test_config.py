"""The configuration: an exact round trip, and an error that says what, expected, got and how to mend it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from cases import any_config
from hypothesis import given

from bmojo.config import STORAGE_SIZES, ModelConfig
from bmojo.errors import BMojoError, ConfigError, nearest


@given(any_config())
def test_json_round_trip(config):
    assert ModelConfig.from_json(config.to_json()) == config
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict() == json.loads(config.to_json())
    assert hash(config) == hash(ModelConfig.from_json(config.to_json()))


ERRORS = [
    *(({name: wrong}, f"{name} must be a whole number of at least 1")
      for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "chunk_size", "ssm_expand",
                   "ssm_head_dim", "ssm_state_size", "ssm_groups", "ssm_conv", "innovation_dim")
      for wrong in (0, 1.5, True)),
    *(({name: -1}, f"{name} must be a whole number of at least 0, got -1")
      for name in ("intermediate_size", "conv_size", "fading_span", "eidetic_slots")),
    ({"ssm": "sdd"}, "unknown ssm 'sdd'; did you mean 'ssd'? known: gdn, s6, ssd"),
    ({"fading": "windows"}, "did you mean 'window'?"),
    ({"positions": "tru"}, "did you mean 'true'?"),
    ({"innovation": "randon"}, "did you mean 'random'?"),
    ({"pattern": ("bmoj",)}, "unknown pattern 'bmoj'; did you mean 'bmojo'?"),
    ({"pattern": ()}, "pattern must name at least one layer kind, got none"),
    ({"pattern": ("ssm",) * 3}, "pattern has 3 kinds for num_layers=2; use num_layers of at least 3"),
    ({"hidden_size": 126}, "hidden_size must be a multiple of num_heads (4), got 126; or give head_dim"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"head_dim": 1}, "head_dim must be a whole number of at least 2"),
    ({"num_kv_heads": 3}, "num_heads (4) must be a multiple of num_kv_heads (3)"),
    ({"ssm_head_dim": 48, "fading_span": 64}, "ssm_expand * hidden_size (128) must be a multiple of ssm_head_dim (48)"),
    ({"ssm_groups": 3, "fading_span": 64}, "the 4 SSM heads must divide into ssm_groups (3)"),
    ({"window": 100}, "window must be a positive multiple of chunk (64), got 100; use 64 or 128"),
    ({"window": 0}, "window must be a positive multiple of chunk (64), got 0; use 64 or 128"),
    ({"window": "all"}, "window must be a positive multiple of chunk (64), got all"),
    ({"fading_span": 65}, "fading_span must be a multiple of chunk (64), got 65; use 64 or 128"),
    ({"window": None}, "a bmojo layer needs a finite window, got None"),
    ({"pattern": ("ssm",), "eidetic_slots": 3}, "eidetic_slots=3 is used by bmojo layers alone; pattern has none"),
    ({"pattern": ("attention",), "fading_span": 64}, "fading_span=64 is used by bmojo layers alone"),
    ({"innovation_forgetting": 0.0}, "innovation_forgetting must be in (0, 1], got 0.0"),
    ({"innovation_forgetting": 1.1}, "innovation_forgetting must be in (0, 1]"),
    ({"eidetic_decay": 0}, "eidetic_decay must be in (0, 1], got 0"),
    ({"eidetic_threshold": -0.1}, "eidetic_threshold must be at least 0, got -0.1"),
    ({"windw": 3}, "unknown setting 'windw'; did you mean 'window'?"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), ERRORS, ids=lambda z: str(z)[:40])
def test_every_error_says_how_to_mend_it(fields, message):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(fields)
    assert message in str(caught.value)
    assert isinstance(caught.value, BMojoError)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "must be a JSON object, got list")])
def test_what_is_no_configuration_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(text)


def test_a_setting_that_no_layer_uses_does_not_forbid_a_model():
    ModelConfig(pattern=("attention",), hidden_size=48, num_heads=4)


@pytest.mark.parametrize("fields", [{"rope_theta": 0.0}, {"norm_eps": -1.0}, {"initializer_range": -0.1},
                                    {"eidetic_threshold": float("nan")}])  # fmt: skip
def test_numbers_that_no_model_can_use_are_refused(fields):
    with pytest.raises(ConfigError):
        ModelConfig(**fields)


def test_it_is_frozen_and_knows_its_derived_sizes():
    config = ModelConfig(pattern=["ssm", "bmojo"], num_layers=3, ssm_expand=2, fading="summary")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
    assert config.kinds == ("ssm", "bmojo", "ssm")
    assert (config.ssm_size, config.ssm_heads, config.fading_stride) == (256, 8, 64)
    assert (config.head_dim, config.num_kv_heads) == (32, 4)
    assert ModelConfig().fading_stride == 1


def test_replace_lets_derived_sizes_follow():
    config = ModelConfig()
    assert config.replace(hidden_size=256).head_dim == 64
    assert config.replace(num_heads=8).num_kv_heads == 8
    assert config.replace(num_heads=8, head_dim=32).head_dim == 32
    own = ModelConfig(head_dim=16, num_kv_heads=2)
    assert (own.replace(hidden_size=256).head_dim, own.replace(num_heads=8).num_kv_heads) == (16, 2)
    with pytest.raises(ConfigError, match="did you mean 'window'"):
        config.replace(windw=3)


def test_nearest_name():
    assert nearest("widnow", ["window", "chunk"]) == "did you mean 'window'? known: chunk, window"
    assert nearest("xyz", ["window", "chunk"]) == "known: chunk, window"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "bmojo"}, "pattern must be a list"),
        ({"tie_embeddings": "no"}, "tie_embeddings must be true or false, got 'no'"),
        ({"rope_theta": "x"}, "rope_theta must be a number, got 'x'"),
    ],
)
def test_values_of_another_type_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**fields)


def test_unused_settings_are_named():
    assert "innovation" in ModelConfig(pattern=("attention",)).unused
    assert "ssm_state_size" in ModelConfig(pattern=("attention",)).unused
    assert "window" in ModelConfig(pattern=("ssm",)).unused
    assert ModelConfig(pattern=("bmojo",), fading_span=64, eidetic_slots=8).unused == {
        "head_loss_weight",
        "ssm_dt_rank",
        *STORAGE_SIZES,
    }
    assert ModelConfig(pattern=("ssm",), ssm="s6").unused >= {"ssm_head_dim", "ssm_groups", "ssm_norm_eps"}
    assert "ssm_dt_rank" not in ModelConfig(pattern=("ssm",), ssm="s6").unused
    other = ModelConfig(fading_span=64, eidetic_slots=8, innovation="head", admission="innovation")
    idle = {"admission_loss_weight", "innovation_forgetting", "innovation_dim", "ssm_dt_rank"}
    assert other.unused == {*idle, *STORAGE_SIZES}
    assert other.replace(storage_layers=(-1,)).unused == idle


def test_layers_with_storage():
    config = ModelConfig(num_layers=3, storage_layers=(-1, 0))
    assert config.storage_layers == (0, 2)
    assert ModelConfig.from_json(config.to_json()) == config
    for fields, message in (
        ({"storage_layers": (3,)}, "must name layers 0 to 2, got 3"),
        ({"pattern": ("ssm",)}, "layer 0 is 'ssm'"),
        ({"pattern": ("full",)}, "layer 0 is 'full' without window"),
        ({"storage_stride": 48}, "storage_stride must divide chunk_size"),
        ({"storage_queries": 65}, "storage_queries must be at most chunk_size"),
        ({"storage_block": 96, "window": 128}, "storage_block must divide chunk_size"),
        ({"storage_block": 128}, "storage_block must be at most the window"),
        ({"storage_keys": 65}, "storage_keys must be at most storage_block"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModelConfig(**{"num_layers": 3, "storage_layers": (0,), **fields})


def test_a_folder_older_than_learned_admission_keeps_to_innovation():
    fields = ModelConfig(eidetic_slots=4, admission="learned").to_checkpoint()
    assert ModelConfig.from_checkpoint(fields).admission == "learned"
    del fields["admission"]
    assert ModelConfig.from_checkpoint(fields).admission == "innovation"
    assert ModelConfig.from_checkpoint({"eidetic_slots": 4}).admission == ModelConfig().admission
