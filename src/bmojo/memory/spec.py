"""What a layer's state consists of: the one place that names its tensors and gives their shapes. Needs no torch.

| tensor | shape of a row | what it is |
| --- | --- | --- |
| `position`, `document` | - | tokens read of the current document; its id, -1 if never told |
| `ssm` | [heads, state_size, head_dim]; s6: [state_size, channels] | recurrent state of the SSM |
| `transition` | ssd: [heads, 1, 1]; s6: as `ssm`; gdn: [heads, state_size, state_size] | of `tracked` states alone |
| `ssm_conv`, `conv` | [size - 1, channels] | the last inputs of the SSM's convolution, and of the keys' |
| `k`, `v` | [window, kv_heads, head_dim] | the window, a ring (p at p % window); without one a cache that grows |
| `fading_k`, `fading_v` | [entries, kv_heads, head_dim] | the fading tokens, a ring |
| `slot_k`, `slot_v` | [slots, kv_heads, head_dim] | the eidetic set |
| `slot_score`, `slot_position` | [slots] | its scores and positions; position -1: the slot is empty |
| `pending` | [chunk] | scores of the chunk in progress |
| `rls_A`, `rls_M`, `ema`, `last_y` | | what the innovation test keeps (see `bmojo.ops.innovation`) |

Keys in rings and caches are turned by their positions; in the slots too, unless positions are compact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bmojo.config import ModelConfig

CACHE_BLOCK = 256  # a cache without a window grows by whole blocks of this many tokens


@dataclass(frozen=True)
class Entry:
    """`kind`: "verbatim" (the model's dtype), "exact" (float32 at least) or "integer" (int64)."""

    shape: tuple[int, ...]
    kind: str

    def nbytes(self, width: int = 4) -> int:
        """Bytes of a row, where a verbatim number takes `width`."""
        return math.prod(self.shape) * {"verbatim": width, "exact": max(4, width), "integer": 8}[self.kind]


def ssm_channels(config: ModelConfig) -> int:
    """Channels of the SSM's convolution."""
    return config.ssm_size + (0 if config.ssm == "s6" else 2 * config.ssm_groups * config.ssm_state_size)


def fading_entries(config: ModelConfig) -> int:
    """Fading tokens that a query may have to reach."""
    assert config.window is not None
    return (config.window + config.fading_span) // config.fading_stride


def transition_shape(config: ModelConfig) -> tuple[int, ...]:
    match config.ssm:
        case "s6":
            return config.ssm_state_size, config.ssm_size
        case "gdn":
            return config.ssm_heads, config.ssm_state_size, config.ssm_state_size
    return config.ssm_heads, 1, 1


def innovation_dim(config: ModelConfig) -> int:
    return min(config.innovation_dim, config.hidden_size)


def layer_spec(config: ModelConfig, kind: str, context: int = 0, *, tracked: bool = False) -> dict[str, Entry]:
    """The tensors of a layer's state. `context` counts for an attention layer without a window alone; `tracked` states
    have the transition of the SSM."""
    has = config.parts(kind)
    spec = {"position": Entry((), "integer"), "document": Entry((), "integer")}
    if has.ssm:
        heads = (config.ssm_heads, config.ssm_state_size, config.ssm_head_dim)
        spec["ssm"] = Entry((config.ssm_state_size, config.ssm_size) if config.ssm == "s6" else heads, "exact")
        if tracked:
            spec["transition"] = Entry(transition_shape(config), "exact")
        spec["ssm_conv"] = Entry((config.ssm_conv - 1, ssm_channels(config)), "verbatim")
    if not has.attention:
        return spec

    def pair(prefix: str, rows: int) -> dict[str, Entry]:
        entry = Entry((rows, config.num_kv_heads, config.head_dim), "verbatim")
        return {f"{prefix}k": entry, f"{prefix}v": entry}

    if config.conv_size:
        spec["conv"] = Entry((config.conv_size - 1, config.hidden_size), "verbatim")
    blocks = -(-context // CACHE_BLOCK)
    window = config.window_of(kind)
    spec |= pair("", blocks * CACHE_BLOCK if window is None else window)
    if has.fading:
        spec |= pair("fading_", fading_entries(config))
    if has.eidetic:
        spec |= pair("slot_", config.eidetic_slots)
        spec["slot_score"] = Entry((config.eidetic_slots,), "exact")
        spec["slot_position"] = Entry((config.eidetic_slots,), "integer")
        spec["pending"] = Entry((config.chunk_size,), "exact")
        dim, hidden = innovation_dim(config), config.hidden_size
        own = {
            "rls": {"rls_A": Entry((dim, dim), "exact"), "rls_M": Entry((dim, dim), "exact")},
            "ema": {"ema": Entry((hidden,), "exact")},
            "head": {"last_y": Entry((hidden,), "verbatim")},
        }
        spec |= own.get(config.innovation, {})
    return spec
