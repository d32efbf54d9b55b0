"""Bamba: a dense stack of Mamba-2 and attention layers, each with an MLP."""

from __future__ import annotations

from typing import Any

from bmojo.config import ModelConfig
from bmojo.convert.blocks import ATTENTION, LLAMA, attention, head_sizes, mamba2, rope_theta, write_rope
from bmojo.convert.mamba2 import UNLIMITED, check_steps
from bmojo.convert.mapping import Field, Format, Reading, layer_kinds, layers


def _read(reading: Reading, ours: dict[str, Any]) -> dict[str, Any]:
    check_steps(reading)
    attends = reading.get("attn_layer_indices", [])
    if not isinstance(attends, list):
        reading.refuse(f"attn_layer_indices={attends!r} (expected a list)")
        attends = []
    kinds = ["full" if i in attends else "ssm" for i in range(ours["num_layers"])]
    size, heads = ours["ssm_expand"] * ours["hidden_size"], max(1, reading.count("mamba_n_heads", 128))
    automatic = reading.get("mamba_d_head", "auto") == "auto"
    head_dim = size // heads if automatic else reading.count("mamba_d_head")
    if heads * head_dim != size:
        reading.refuse(f"mamba_n_heads * mamba_d_head = {heads * head_dim} (expected expand * hidden_size = {size})")
    return {
        **layers(kinds, None),
        "ssm": "ssd",
        "ssm_head_dim": head_dim,
        "rope_theta": rope_theta(reading, 0.5),  # Bamba turns half of each head unless it is told otherwise
        **head_sizes(reading, ours, num_kv_heads=8),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config)["rope_parameters"] | {"partial_rotary_factor": 1.0}
    return {
        "rope_parameters": rope,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attn_layer_indices": [i for i, kind in enumerate(layer_kinds(config)) if kind == "full"],
        "mamba_n_heads": config.ssm_heads,
        "mamba_d_head": config.ssm_head_dim,
        "mamba_chunk_size": config.chunk_size,
        "time_step_limit": UNLIMITED,
    }


FORMATS = (
    Format(
        "bamba",
        "BambaForCausalLM",
        names=LLAMA._replace(norm="model.final_layernorm.weight", mlp_norm="pre_ff_layernorm", mlp="feed_forward"),
        fields=(
            *(field._replace(default=1e-5) if field.theirs == "rms_norm_eps" else field for field in ATTENTION),
            Field("mamba_expand", "ssm_expand", 2),
            Field("mamba_d_state", "ssm_state_size", 256),
            Field("mamba_n_groups", "ssm_groups", 1),
            Field("mamba_d_conv", "ssm_conv", 4),
        ),
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
        },
        read_layers=_read,
        write_layers=_write,
        mixers={"full": attention, "ssm": lambda config: mamba2(config, "mamba")},
    ),
)
