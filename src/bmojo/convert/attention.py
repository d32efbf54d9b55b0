"""Llama, Mistral, Qwen2 and Qwen3: stacks of attention layers, and what sets each apart."""

from __future__ import annotations

from typing import Any

from bmojo.config import ModelConfig
from bmojo.convert.blocks import ATTENTION, LLAMA, attention, head_sizes, rope_theta, write_rope
from bmojo.convert.mapping import Format, Reading, layer_kinds, layers

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


def _qwen_layers(reading: Reading, ours: Settings, **settings: Any) -> Settings:
    """Qwen lets the first `max_window_layers` see the whole past, or names each layer's kind."""
    count, slides = ours["num_layers"], reading.get("use_sliding_window", False)
    window = reading.count("sliding_window", 4096) if slides else None
    first = reading.number("max_window_layers", 28)
    usual = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(count)]
    named = reading.get("layer_types", usual)
    if not isinstance(named, list) or len(named) != count:
        reading.refuse(f"layer_types={named!r} (expected a kind for each of {count} layers)")
        named = usual
    for name in sorted(set(map(str, named)) - {"full_attention", "sliding_attention"}):
        reading.refuse(f"layer_types has {name!r}")
    if window is None and "sliding_attention" in named:
        reading.refuse("layer_types has 'sliding_attention', but use_sliding_window is false")
    kinds = ["attention" if name == "sliding_attention" else "full" for name in named]
    return {**layers(kinds, window), "rope_theta": rope_theta(reading), **settings}


def _read_qwen2(reading: Reading, ours: Settings) -> Settings:
    return _qwen_layers(reading, ours, qkv_bias=True, **head_sizes(reading, ours, num_kv_heads=32))


def _read_qwen3(reading: Reading, ours: Settings) -> Settings:
    return _qwen_layers(reading, ours, qk_norm=True, **head_sizes(reading, ours, num_kv_heads=32, head_dim=128))


def _write_qwen(config: ModelConfig) -> Settings:
    kinds = layer_kinds(config)
    slides = "attention" in kinds
    return {
        **_write(config),
        "use_sliding_window": slides,
        "sliding_window": config.window if slides else None,
        "max_window_layers": kinds.index("attention") if slides else len(kinds),
        "layer_types": ["sliding_attention" if kind == "attention" else "full_attention" for kind in kinds],
    }


_SILU = {"hidden_act": "silu"}
_STACK: Settings = {"names": LLAMA, "fields": ATTENTION, "mixers": {"attention": attention, "full": attention}}
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
