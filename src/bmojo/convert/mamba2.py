"""Mamba-2, as Transformers stores it: layers of the state-space kind and nothing else."""

from __future__ import annotations

from typing import Any

from bmojo.config import ModelConfig
from bmojo.convert.blocks import BACKBONE, MODEL, mamba2
from bmojo.convert.mapping import Field, Format, Reading

UNLIMITED = [0.0, float("inf")]


def check_steps(reading: Reading) -> None:
    limit = reading.get("time_step_limit", UNLIMITED)
    if limit not in (UNLIMITED, tuple(UNLIMITED)):
        reading.refuse(f"time_step_limit={limit!r} (steps are clamped)")


def _read(reading: Reading, ours: dict[str, Any]) -> dict[str, Any]:
    check_steps(reading)
    heads, size = reading.count("num_heads", 128), ours["ssm_expand"] * ours["hidden_size"]
    if heads * ours["ssm_head_dim"] != size:
        reading.refuse(
            f"num_heads * head_dim = {heads * ours['ssm_head_dim']} (expected expand * hidden_size = {size})"
        )
    return {"pattern": ("ssm",), "ssm": "ssd", "window": None, "intermediate_size": 0, "num_heads": 1}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"num_heads": config.ssm_heads, "time_step_limit": UNLIMITED, "chunk_size": config.chunk_size}


FORMATS = (
    Format(
        "mamba2",
        "Mamba2ForCausalLM",
        names=BACKBONE,
        fields=(
            *MODEL,
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            Field("tie_word_embeddings", "tie_embeddings", False),
            Field("expand", "ssm_expand", 2),
            Field("head_dim", "ssm_head_dim", 64),
            Field("state_size", "ssm_state_size", 128),
            Field("n_groups", "ssm_groups", 8),
            Field("conv_kernel", "ssm_conv", 4),
        ),
        fixed={"hidden_act": "silu", "use_bias": False, "use_conv_bias": True},
        read_layers=_read,
        write_layers=_write,
        mixers={"ssm": lambda config: mamba2(config, "mixer")},
    ),
)
