import copy
import json

import pytest
from cases import any_config, small_preset
from hf_cases import PRESETS
from hypothesis import given
from transformers import AutoConfig

import bmojo
from bmojo import BMojoConfig, ModelConfig
from bmojo.errors import BMojoError, ConfigError


@given(any_config())
def test_every_configuration_goes_there_and_back(core):
    config = BMojoConfig.from_core(core)
    assert config.core == core
    assert ModelConfig.from_checkpoint(config.to_json_string(use_diff=False)) == core
    assert ModelConfig.from_checkpoint(config.to_json_string()) == core
    assert BMojoConfig(**json.loads(config.to_json_string())).core == core
    assert BMojoConfig.from_dict(config.to_dict()).core == core
    assert copy.deepcopy(config).core == core


@pytest.mark.parametrize("name", PRESETS)
def test_saved_and_loaded(name, tmp_path):
    config = BMojoConfig.from_core(small_preset(name), use_cache=False, eos_token_id=3, id2label={0: "a", 1: "b"})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is BMojoConfig
    assert again.to_diff_dict() == config.to_diff_dict()
    assert (again.use_cache, again.eos_token_id) == (False, 3)
    assert ModelConfig.from_checkpoint((tmp_path / "config.json").read_text()) == config.core


def test_names_of_transformers_are_aliases():
    config = BMojoConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 8, 2, 8)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 8, 2)
    assert config.core.num_layers == 3
    config.num_hidden_layers = 4
    assert config.core.num_layers == 4
    assert config.get_text_config() is config
    assert "num_hidden_layers" not in json.loads(config.to_json_string())


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_told_to_transformers(tied):
    assert BMojoConfig(tie_embeddings=tied).tie_word_embeddings is tied
    with pytest.raises(ConfigError, match=r"tie_word_embeddings is .* and tie_embeddings .*; give tie_embeddings"):
        BMojoConfig(tie_embeddings=tied, tie_word_embeddings=not tied)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windw": 8}, r"unknown setting 'windw'; did you mean 'window'\?"),
        ({"num_hidden_layer": 8}, r"unknown setting 'num_hidden_layer'; did you mean 'num_layers'"),
        ({"window": 7, "chunk_size": 4}, r"window must be a positive multiple of chunk \(4\), got 7; use 4 or 8"),
        ({"format_version": 2}, r"format_version is 2, this bmojo reads up to 1; update bmojo"),
        ({"model_type": "llama"}, r"model_type must be 'bmojo', got 'llama'; use `bmojo convert`"),
        ({"num_layers": 2, "num_hidden_layers": 3}, r"num_hidden_layers and num_layers are the same setting"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BMojoConfig(**fields)


def test_a_setting_that_is_changed_later_is_checked_when_the_model_is_made():
    config = BMojoConfig(**small_preset("swa").to_dict())
    config.window = 7
    with pytest.raises(BMojoError, match="window must be"):
        bmojo.BMojoForCausalLM(config)


def test_names_that_the_package_has_not():
    import bmojo.hf

    for module in (bmojo, bmojo.hf):
        with pytest.raises(AttributeError, match="BMojoForCausaLM"):
            _ = module.BMojoForCausaLM


def test_an_attribute_that_could_not_be_loaded_again_is_not_saved(tmp_path):
    config = BMojoConfig()
    config.windows = 3
    with pytest.raises(ConfigError, match="unknown setting 'windows'; did you mean 'window'"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
