"""Parameters, FLOPs and state bytes of a configuration, counted without building the model (and without torch).

FLOPs are those of the matrix products, 2 a multiply-add, for one token of a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmojo.config import ModelConfig
from bmojo.memory.spec import innovation_dim, layer_spec, ssm_channels


def ssm_parameters(config: ModelConfig) -> int:
    hidden, size, heads = config.hidden_size, config.ssm_size, config.ssm_heads
    shared = config.ssm_groups * config.ssm_state_size
    channels = ssm_channels(config)
    if config.ssm == "s6":
        selects = (
            size * (config.ssm_dt_rank + 2 * config.ssm_state_size) + (config.ssm_dt_rank + 1) * size
        )  # B, C and steps
        own = channels * (config.ssm_conv + 1) + size * (config.ssm_state_size + 1)  # convolution, A_log and D
        return 3 * hidden * size + selects + own
    if config.ssm == "ssd":
        return (
            hidden * (2 * size + 2 * shared + heads)
            + channels * (config.ssm_conv + 1)
            + 3 * heads
            + size * (hidden + 1)
        )
    return (
        hidden * (2 * size + 2 * shared + 2 * heads)
        + channels * config.ssm_conv
        + 2 * heads
        + config.ssm_head_dim
        + size * hidden
    )


def mixer_parameters(config: ModelConfig, kind: str) -> int:
    hidden, size = config.hidden_size, config.head_dim
    has = config.parts(kind)
    count = ssm_parameters(config) if has.ssm else 0
    if has.attention:
        wide, keys = config.num_heads * size, config.num_kv_heads * size
        source = (hidden + config.qkv_bias) * (wide + 2 * keys) + (2 * size if config.qk_norm else 0)
        count += source + wide * hidden + hidden * config.conv_size
        if has.fading and not config.tie_sources:
            count += source
        if has.eidetic and config.innovation == "head":
            count += hidden * hidden
        if has.eidetic and config.admission == "learned":
            count += hidden * (1 + bool(config.conv_size)) + 1
    return count


def layer_parameters(config: ModelConfig, kind: str) -> int:
    hidden, mlp = config.hidden_size, config.intermediate_size
    return mixer_parameters(config, kind) + hidden + (3 * hidden * mlp + hidden if mlp else 0)


def parameters(config: ModelConfig) -> int:
    """All trained parameters of the model."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return embeddings + config.hidden_size + sum(layer_parameters(config, kind) for kind in config.kinds)


def layer_flops(config: ModelConfig, kind: str, context: int) -> int:
    """FLOPs of one token that has `context` tokens behind it, in a layer (attention over what it can see)."""
    hidden, chunk, size = config.hidden_size, config.chunk_size, config.head_dim
    has = config.parts(kind)
    multiply_adds = 3 * hidden * config.intermediate_size
    if has.ssm and config.ssm == "s6":
        multiply_adds += config.ssm_size * (3 * hidden + 2 * config.ssm_dt_rank + 2 * config.ssm_state_size)
        multiply_adds += 4 * config.ssm_size * config.ssm_state_size  # the scan: exponent, decay, write and read
    elif has.ssm:
        shared, extra = config.ssm_groups * config.ssm_state_size, config.ssm_heads * (1 if config.ssm == "ssd" else 2)
        multiply_adds += hidden * (3 * config.ssm_size + 2 * shared + extra)
        within = min(chunk, context + 1)
        pairs = config.ssm_groups if config.ssm == "ssd" else 3 * config.ssm_heads
        multiply_adds += within * (pairs * config.ssm_state_size + config.ssm_size) // 2
        multiply_adds += (2 if config.ssm == "ssd" else 3) * config.ssm_size * config.ssm_state_size
    if has.attention:
        wide, keys = config.num_heads * size, config.num_kv_heads * size
        multiply_adds += hidden * (2 * wide + 2 * keys)
        window = config.window_of(kind)
        seen = context + 1 if window is None else min(window, context + 1)
        if kind == "bmojo" and window is not None:
            fading = max(0, min(config.fading_span, context + 1 - window)) // config.fading_stride
            seen += fading + max(0, min(config.eidetic_slots, context + 1 - window))
            if has.fading:
                multiply_adds += 2 * hidden * keys // config.fading_stride
                multiply_adds += 0 if config.tie_sources else hidden * wide
            if has.eidetic and config.innovation == "rls":
                dim = innovation_dim(config)
                multiply_adds += hidden * dim + 3 * dim * dim + chunk * dim
            if has.eidetic and config.innovation == "head":
                multiply_adds += hidden * hidden
            if has.eidetic and config.admission == "learned":
                multiply_adds += hidden * (1 + bool(config.conv_size))
        multiply_adds += (2 if config.tie_sources or not has.fading else 3) * wide * seen
    return 2 * multiply_adds


def layer_state_bytes(config: ModelConfig, kind: str, context: int, *, width: int = 4) -> int:
    """Bytes that one row of a layer's state takes after `context` tokens; `width` bytes a verbatim number."""
    return sum(entry.nbytes(width) for entry in layer_spec(config, kind, context).values())


@dataclass(frozen=True)
class Costs:
    """What `bmojo info` prints of one layer, or of the whole model."""

    parameters: int
    flops: list[int]
    state_bytes: list[int]


def costs(config: ModelConfig, contexts: list[int]) -> tuple[list[Costs], Costs]:
    """Per layer, and in all (with embedding, final norm and head)."""
    layers = [
        Costs(
            layer_parameters(config, kind),
            [layer_flops(config, kind, context) for context in contexts],
            [layer_state_bytes(config, kind, context) for context in contexts],
        )
        for kind in config.kinds
    ]
    head = 2 * config.hidden_size * config.vocab_size
    return layers, Costs(
        parameters(config),
        [head + sum(layer.flops[i] for layer in layers) for i in range(len(contexts))],
        [sum(layer.state_bytes[i] for layer in layers) for i in range(len(contexts))],
    )
