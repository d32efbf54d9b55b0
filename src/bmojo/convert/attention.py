"""Llama, Mistral, Qwen2 and Qwen3: one stack of attention layers, and what sets each apart."""

from __future__ import annotations

from typing import Any

from bmojo.config import ModelConfig
from bmojo.convert.blocks import ATTENTION, LLAMA, attention, head_sizes, rope_theta, write_rope
from bmojo.convert.mapping import Format, Reading

Settings = dict[str, Any]


def _layers(reading: Reading, window: int | None, **settings: Any) -> Settings:
    return {"pattern": ("attention",), "window": window, "rope_theta": rope_theta(reading), **settings}


def _write(config: ModelConfig) -> Settings:
    heads = {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return {**write_rope(config), **heads}


def _read_llama(reading: Reading, ours: Settings) -> Settings:
    return _layers(reading, None, **head_sizes(reading, ours))


def _read_mistral(reading: Reading, ours: Settings) -> Settings:
    slides = reading.settings.get("sliding_window", 4096) is not None  # null: the whole past
    window = reading.count("sliding_window", 4096) if slides else None
    return _layers(reading, window, **head_sizes(reading, ours, num_kv_heads=8))


def _write_mistral(config: ModelConfig) -> Settings:
    return {**_write(config), "sliding_window": config.window}


def _qwen_window(reading: Reading, layers: int) -> int | None:
    """The window of all layers. Qwen lets the first `max_window_layers` see the whole past, or names each layer's
    kind; a model of both kinds has no place here unless a window is forced on it."""
    window = reading.count("sliding_window", 4096) if reading.get("use_sliding_window", False) else None
    first = reading.number("max_window_layers", 28)
    usual = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    named = reading.get("layer_types", usual)
    if not isinstance(named, list) or len(named) != layers:
        reading.refuse(f"layer_types={named!r} (expected a kind for each of {layers} layers)")
        return None
    kinds = set(map(str, named))
    for kind in sorted(kinds - {"full_attention", "sliding_attention"}):
        reading.refuse(f"layer_types has {kind!r}")
    if kinds == {"full_attention"}:
        return None
    if "full_attention" in kinds and reading.window is None:
        reading.refuse("some layers attend to the whole past and some to a window of it; force one window on all")
    if window is None:
        reading.refuse("layer_types has 'sliding_attention', but use_sliding_window is false")
    return window


def _read_qwen2(reading: Reading, ours: Settings) -> Settings:
    sizes = head_sizes(reading, ours, num_kv_heads=32)
    return _layers(reading, _qwen_window(reading, ours["num_layers"]), qkv_bias=True, **sizes)


def _read_qwen3(reading: Reading, ours: Settings) -> Settings:
    sizes = head_sizes(reading, ours, num_kv_heads=32, head_dim=128)
    return _layers(reading, _qwen_window(reading, ours["num_layers"]), qk_norm=True, **sizes)


def _write_qwen(config: ModelConfig) -> Settings:
    slides = config.window is not None
    kind = "sliding_attention" if slides else "full_attention"
    return {
        **_write(config),
        "use_sliding_window": slides,
        "sliding_window": config.window,
        "max_window_layers": 0 if slides else config.num_layers,
        "layer_types": [kind] * config.num_layers,
    }


_SILU = {"hidden_act": "silu"}
_STACK: Settings = {"names": LLAMA, "fields": ATTENTION, "mixers": {"attention": attention}}
FORMATS = (
    Format(
        "llama",
        "LlamaForCausalLM",
        read_layers=_read_llama,
        write_layers=_write,
        fixed={**_SILU, "attention_bias": False, "mlp_bias": False},
        **_STACK,
    ),
    Format(
        "mistral",
        "MistralForCausalLM",
        read_layers=_read_mistral,
        write_layers=_write_mistral,
        fixed=_SILU,
        **_STACK,
    ),
    Format("qwen2", "Qwen2ForCausalLM", read_layers=_read_qwen2, write_layers=_write_qwen, fixed=_SILU, **_STACK),
    Format(
        "qwen3",
        "Qwen3ForCausalLM",
        read_layers=_read_qwen3,
        write_layers=_write_qwen,
        fixed={**_SILU, "attention_bias": False},
        **_STACK,
    ),
)
