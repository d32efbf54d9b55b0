"""Mamba, the first, as Transformers stores it: layers of the state-space kind and nothing else."""

from __future__ import annotations

from typing import Any

from bmojo.config import ModelConfig
from bmojo.convert.blocks import BACKBONE, MODEL, mamba
from bmojo.convert.mapping import Field, Format, Reading


def _read(reading: Reading, ours: dict[str, Any]) -> dict[str, Any]:
    automatic = reading.get("time_step_rank", "auto") == "auto"
    rank = 0 if automatic else reading.count("time_step_rank")
    return {
        "pattern": ("ssm",),
        "ssm": "s6",
        "ssm_dt_rank": rank,
        "window": None,
        "intermediate_size": 0,
        "num_heads": 1,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"time_step_rank": config.ssm_dt_rank, "intermediate_size": config.ssm_size}


FORMATS = (
    Format(
        "mamba",
        "MambaForCausalLM",
        names=BACKBONE,
        fields=(
            *MODEL,
            Field("layer_norm_epsilon", "norm_eps", 1e-5),
            Field("tie_word_embeddings", "tie_embeddings", True),
            Field("expand", "ssm_expand", 2),
            Field("state_size", "ssm_state_size", 16),
            Field("conv_kernel", "ssm_conv", 4),
        ),
        fixed={"hidden_act": "silu", "use_bias": False, "use_conv_bias": True},
        read_layers=_read,
        write_layers=_write,
        mixers={"ssm": lambda config: mamba(config, "mixer")},
    ),
)
