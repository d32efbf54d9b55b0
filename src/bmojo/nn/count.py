"""Parameters, FLOPs and state bytes of a configuration, counted without building the model (and without torch).

FLOPs are those of the matrix products, 2 a multiply-add, for one token of a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmojo.config import ModelConfig

CACHE_BLOCK = 256


def ssm_parameters(config: ModelConfig) -> int:
    hidden, size, heads = config.hidden_size, config.ssm_size, config.ssm_heads
    shared = config.ssm_groups * config.ssm_state_size
    channels = size + 2 * shared
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


def _parts(config: ModelConfig, kind: str) -> tuple[bool, bool, bool]:
    """Whether a layer of this kind has an SSM, an attention readout, an eidetic memory."""
    eidetic = kind == "bmojo" and config.eidetic_slots > 0
    reads_ssm = eidetic and config.innovation in ("state", "head")
    has_ssm = kind == "ssm" or (kind == "bmojo" and (config.fading_span > 0 or reads_ssm))
    return has_ssm, kind != "ssm", eidetic


def mixer_parameters(config: ModelConfig, kind: str) -> int:
    hidden, size = config.hidden_size, config.head_dim
    has_ssm, has_attention, eidetic = _parts(config, kind)
    count = ssm_parameters(config) if has_ssm else 0
    if has_attention:
        keys = config.num_kv_heads * size
        norms = 2 * size if config.qk_norm else 0
        count += 2 * hidden * config.num_heads * size + 2 * hidden * keys + norms + hidden * config.conv_size
        if kind == "bmojo" and config.fading_span and not config.tie_sources:
            count += 2 * hidden * keys + norms // 2
        if eidetic and config.innovation == "head":
            count += hidden * hidden
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
    has_ssm, has_attention, eidetic = _parts(config, kind)
    multiply_adds = 3 * hidden * config.intermediate_size
    if has_ssm:
        shared, extra = config.ssm_groups * config.ssm_state_size, config.ssm_heads * (1 if config.ssm == "ssd" else 2)
        multiply_adds += hidden * (3 * config.ssm_size + 2 * shared + extra)
        within = min(chunk, context + 1)
        pairs = config.ssm_groups if config.ssm == "ssd" else 3 * config.ssm_heads
        multiply_adds += within * (pairs * config.ssm_state_size + config.ssm_size) // 2
        multiply_adds += (2 if config.ssm == "ssd" else 3) * config.ssm_size * config.ssm_state_size
    if has_attention:
        wide, keys = config.num_heads * size, config.num_kv_heads * size
        multiply_adds += hidden * (2 * wide + 2 * keys)
        seen = context + 1 if config.window is None else min(config.window, context + 1)
        if kind == "bmojo" and config.window is not None:
            fading = max(0, min(config.fading_span, context + 1 - config.window)) // config.fading_stride
            seen += fading + max(0, min(config.eidetic_slots, context + 1 - config.window))
            multiply_adds += 2 * hidden * keys // config.fading_stride if config.fading_span else 0
            if eidetic and config.innovation == "rls":
                dim = min(config.innovation_dim, hidden)
                multiply_adds += hidden * dim + 3 * dim * dim + chunk * dim
            if eidetic and config.innovation == "head":
                multiply_adds += hidden * hidden
        multiply_adds += 2 * wide * seen
    return 2 * multiply_adds


def layer_state_bytes(config: ModelConfig, kind: str, context: int, *, width: int = 4) -> int:
    """Bytes that one row of a layer's state takes after `context` tokens; `width` bytes a verbatim number."""
    hidden, size, exact = config.hidden_size, config.head_dim, max(4, width)
    has_ssm, has_attention, eidetic = _parts(config, kind)
    total = 2 * 8  # position, document
    if has_ssm:
        channels = config.ssm_size + 2 * config.ssm_groups * config.ssm_state_size
        total += exact * config.ssm_size * config.ssm_state_size + width * (config.ssm_conv - 1) * channels
    if has_attention:
        row = 2 * config.num_kv_heads * size * width
        total += width * hidden * max(0, config.conv_size - 1)
        total += row * (-(-context // CACHE_BLOCK) * CACHE_BLOCK if config.window is None else config.window)
        if kind == "bmojo" and config.window is not None and config.fading_span:
            total += row * ((config.window + config.fading_span) // config.fading_stride)
        if eidetic:
            total += config.eidetic_slots * (row + exact + 8) + exact * config.chunk_size
            dim = min(config.innovation_dim, hidden)
            total += {"rls": 2 * exact * dim * dim, "ema": exact * hidden, "head": width * hidden}.get(
                config.innovation, 0
            )
    return total


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
