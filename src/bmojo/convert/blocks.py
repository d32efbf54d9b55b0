"""The mixers that several formats share: settings and tensors under both names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bmojo.config import ModelConfig
from bmojo.convert.mapping import Field, Names, Reading, Rule

# the frame of Llama and of all that is built like it
MODEL = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("num_hidden_layers", "num_layers"),
)
ATTENTION = (
    *MODEL,
    Field("intermediate_size", "intermediate_size"),
    Field("num_attention_heads", "num_heads"),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", False),
)
LLAMA = Names(
    embed="model.embed_tokens.weight",
    norm="model.norm.weight",
    layer="model.layers.{i}.",
    mixer_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
)

# that of both Mambas
BACKBONE = Names("backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers.{i}.", "norm")


def same(ours: str, theirs: str | None = None) -> Rule:
    return Rule(ours, ((ours if theirs is None else theirs, None),))


def attention(config: ModelConfig, theirs: str = "self_attn") -> Iterator[Rule]:
    for name in "qkvo":
        yield same(f"{name}_proj.weight", f"{theirs}.{name}_proj.weight")
        if config.qkv_bias and name != "o":
            yield same(f"{name}_proj.bias", f"{theirs}.{name}_proj.bias")
    for name in "qk" if config.qk_norm else "":
        yield same(f"{name}_norm.weight", f"{theirs}.{name}_norm.weight")


def mamba2(config: ModelConfig, theirs: str) -> Iterator[Rule]:
    channels = config.ssm_size + 2 * config.ssm_groups * config.ssm_state_size
    yield Rule("ssm.conv.weight", ((f"{theirs}.conv1d.weight", (channels, 1, config.ssm_conv)),))
    yield same("ssm.conv.bias", f"{theirs}.conv1d.bias")
    for name in ("in_proj.weight", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight"):
        yield same(f"ssm.{name}", f"{theirs}.{name}")


def mamba(config: ModelConfig, theirs: str) -> Iterator[Rule]:
    yield Rule("ssm.conv.weight", ((f"{theirs}.conv1d.weight", (config.ssm_size, 1, config.ssm_conv)),))
    yield same("ssm.conv.bias", f"{theirs}.conv1d.bias")
    yield same("ssm.dt_bias", f"{theirs}.dt_proj.bias")
    for name in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "A_log", "D", "out_proj.weight"):
        yield same(f"ssm.{name}", f"{theirs}.{name}")


def rope_theta(reading: Reading, partial_rotary_factor: float = 1.0) -> float:
    """The base of plain rotary positions; every scaling is refused. Both spellings are read: `rope_parameters`, and
    `rope_theta` with `rope_scaling`."""
    newer = reading.section("rope_parameters")
    scaling = newer if newer.settings else reading.section("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        reading.refuse(f"rope scaling of the type {kind!r}")
    elif any(isinstance(value, dict) for value in scaling.settings.values()):
        reading.refuse("rope_parameters by layer")
    factor = scaling.get("partial_rotary_factor", reading.get("partial_rotary_factor", partial_rotary_factor))
    if factor != 1:
        reading.refuse(f"partial_rotary_factor={factor!r} (rotary positions on a part of each head)")
    return scaling.number("rope_theta", reading.number("rope_theta", 10000.0))


def write_rope(config: ModelConfig) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


def head_sizes(reading: Reading, ours: dict[str, Any], *, num_kv_heads: int = 0, head_dim: int = 0) -> dict[str, int]:
    """Heads of keys and their size; the arguments are what the format assumes where they are missing (0: derived)."""
    return {
        "num_kv_heads": reading.count("num_key_value_heads", num_kv_heads),
        "head_dim": reading.count("head_dim", head_dim),
    }
