"""The named corners of the family, at sizes from a laptop to the papers'.

    config = presets.bmojo("tiny", vocab_size=256, eidetic_slots=64)

Every function takes the size and any field of `ModelConfig`. At one size all presets have the same hidden size and
depth and (within 2 %) the same parameters: the width of the MLP makes up for what the mixers differ in, unless
`intermediate_size` is given. The exceptions are `mamba` and `mamba2` at the papers' sizes, which are the papers'
models: no MLP, twice the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, nearest
from bmojo.nn.count import costs, parameters

# hidden size, layers, heads and MLP width are those of the Transformer of that size; the papers' window is 2048 (the
# authors' B'MOJO-F) and their vocabulary GPT-NeoX's.
_PAPER: dict[str, Any] = {"vocab_size": 50280, "chunk_size": 256, "window": 2048, "eidetic_slots": 256,
                          "ssm_head_dim": 64, "ssm_state_size": 128}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 384, "window": 64,
             "chunk_size": 64, "eidetic_slots": 32, "ssm_head_dim": 32, "ssm_state_size": 16},
    "mini": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 768, "window": 128,
             "chunk_size": 64, "eidetic_slots": 64, "ssm_head_dim": 64, "ssm_state_size": 32},
    "130m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 2048, **_PAPER},
    "370m": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 2816, **_PAPER},
    "790m": {"hidden_size": 1536, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096, **_PAPER},
    "1.4b": {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "intermediate_size": 5632, **_PAPER},
}  # fmt: skip

# what the Transformer to be equalled takes over from a preset's changes
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "head_dim",
    "num_kv_heads",
    "tie_embeddings",
    "qk_norm",
)


def _size(size: str, **preset: Any) -> dict[str, Any]:
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}; {nearest(size, SIZES)}")
    return {**SIZES[size], "eidetic_slots": 0, **preset}


def _build(size: str, fields: dict[str, Any], changes: dict[str, Any]) -> ModelConfig:
    """The preset with its changes, its MLP as wide as makes it equal the Transformer of that size in parameters."""
    config = ModelConfig.from_dict({**fields, **changes})
    if "intermediate_size" in changes or config.intermediate_size == 0:
        return config
    shape = {key: value for key, value in changes.items() if key in _SHAPE}
    return _fit(config, parameters(ModelConfig.from_dict({**_size(size, pattern=["attention"]), **shape})))


def _fit(config: ModelConfig, target: int) -> ModelConfig:
    """The configuration with its MLP as wide as brings it to `target` parameters (in steps of 8 in large models)."""
    step = 8 if config.hidden_size >= 512 else 1
    slope = 3 * config.hidden_size * config.num_layers * step  # parameters grow linearly with the width
    width = config.intermediate_size + round((target - parameters(config)) / slope) * step
    return config.replace(intermediate_size=max(step, width))


def transformer(size: str = "tiny", **changes: Any) -> ModelConfig:
    """Full attention: a Llama."""
    return _build(size, _size(size, pattern=["attention"], window=None), changes)


def swa(size: str = "tiny", **changes: Any) -> ModelConfig:
    """Attention over a sliding window: a Mistral."""
    return _build(size, _size(size, pattern=["attention"]), changes)


def mamba2(size: str = "tiny", **changes: Any) -> ModelConfig:
    """The fading state alone: Mamba-2 (with an MLP at `tiny` and `mini`; intermediate_size=0 leaves it out)."""
    fields = _size(size, pattern=["ssm"], ssm="ssd", ssm_expand=2, window=None)
    if size not in ("tiny", "mini"):
        fields |= {"intermediate_size": 0, "num_layers": 2 * fields["num_layers"]}
    return _build(size, fields, changes)


def mamba(size: str = "tiny", **changes: Any) -> ModelConfig:
    """The fading state alone: Mamba-1 (with an MLP at `tiny` and `mini`; intermediate_size=0 leaves it out)."""
    fields = _size(size, pattern=["ssm"], ssm="s6", ssm_expand=2, ssm_state_size=16, window=None)
    if size not in ("tiny", "mini"):
        fields |= {"intermediate_size": 0, "num_layers": 2 * fields["num_layers"]}
    return _build(size, fields, changes)


def gdn(size: str = "tiny", **changes: Any) -> ModelConfig:
    """The gated delta rule alone, as in the linear layers of Qwen3-Next."""
    fields = _size(size, pattern=["ssm"], ssm="gdn", window=None)
    hidden = changes.get("hidden_size", fields["hidden_size"])
    head_dim = changes.get("ssm_head_dim", fields["ssm_head_dim"])
    fields["ssm_groups"] = max(1, changes.get("ssm_expand", 1) * hidden // max(1, head_dim))  # a key for every head
    return _build(size, fields, changes)


def hybrid(size: str = "tiny", **changes: Any) -> ModelConfig:
    """Mamba-2 and sliding-window attention in turn: a dense Jamba. `window=None` for full attention."""
    return _build(size, _size(size, pattern=["ssm", "attention"], ssm="ssd", ssm_expand=2), changes)


def bmojo_f(size: str = "tiny", **changes: Any) -> ModelConfig:
    """Window and fading memory in one softmax: the authors' B'MOJO-F."""
    fields = _size(size, pattern=["bmojo"], ssm="ssd")
    fields["fading_span"] = _same_span(fields, changes)
    return _build(size, fields, changes)


def bmojo(size: str = "tiny", **changes: Any) -> ModelConfig:
    """Window, fading and eidetic memory in one softmax: full B'MOJO."""
    fields = _size(size, pattern=["bmojo"], ssm="ssd", conv_size=4)
    fields["fading_span"] = _same_span(fields, changes)
    fields["eidetic_slots"] = SIZES[size]["eidetic_slots"]
    return _build(size, fields, changes)


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    function.__name__: function for function in (transformer, swa, mamba, mamba2, gdn, hybrid, bmojo_f, bmojo)
}

# what is compared unless models are named: each kind of memory once, of the two Mambas the newer
COMPARED = tuple(name for name in PRESETS if name != "mamba")


def get(name: str, size: str = "tiny", **changes: Any) -> ModelConfig:
    """A preset by name; an unknown one is refused with the nearest known."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name](size, **changes)


def _same_span(fields: dict[str, Any], changes: dict[str, Any]) -> int:
    """A fading span as long as the window, as in the authors' B'MOJO-F."""
    return changes.get("window", fields["window"]) or 0


def foreign(name: str) -> set[str]:
    """The settings of memories that would make another model of a preset."""
    settings = set() if name == "bmojo" else {"eidetic_slots"}
    settings |= set() if name in ("bmojo", "bmojo_f") else {"fading_span"}
    return settings | ({"window", "storage_layers"} if name in ("transformer", "mamba", "mamba2", "gdn") else set())


def matched(name: str, size: str = "tiny", **changes: Any) -> ModelConfig:
    """A preset to be compared with others at equal parameters: the depth and the parameters of the Transformer of that
    size with these changes. `mamba` and `mamba2` then have an MLP at every size, and a change of the window is left out
    where it would make another model of the preset."""
    _size(size)
    depth = changes.setdefault("num_layers", SIZES[size]["num_layers"])
    width = changes.pop("intermediate_size", SIZES[size]["intermediate_size"])
    window = {"window": changes.pop("window")} if "window" in changes else {}
    shape = {key: value for key, value in changes.items() if key in _SHAPE}
    target = parameters(transformer(size, **shape, intermediate_size=width))
    if "window" not in foreign(name) or "pattern" in changes:
        changes |= window
    return _fit(get(name, size, **{**changes, "num_layers": depth, "intermediate_size": width}), target)


# the setting that sizes a preset's memory, and the multiples of what it comes in
STATE_KNOBS = {"swa": "window", "mamba": "ssm_state_size", "mamba2": "ssm_state_size", "gdn": "ssm_state_size",
               "hybrid": "ssm_state_size", "bmojo_f": "ssm_state_size", "bmojo": "eidetic_slots"}  # fmt: skip


def state_bytes(config: ModelConfig, context: int = 0) -> int:
    """Bytes of the state of one row after `context` tokens, in float32; they are the same at any if it is bounded."""
    return costs(config, [context])[1].state_bytes[0]


def bounded(config: ModelConfig) -> bool:
    """Whether the state stays the same size however long the stream."""
    return all(kind == "ssm" or config.window_of(kind) is not None for kind in config.kinds)


def at_state(name: str, size: str, nbytes: int, **changes: Any) -> ModelConfig:
    """`matched`, with the preset's STATE_KNOBS as large as keeps the state of a stream of any length within `nbytes`
    (a row, in float32). State bytes are affine in every knob. A model without a bounded state is left as it is.

    Raises ConfigError if the least value of the knob takes more.
    """
    as_is = matched(name, size, **changes)
    if name not in STATE_KNOBS or not bounded(as_is):
        return as_is
    knob = STATE_KNOBS[name]
    step = as_is.chunk_size if knob == "window" else 1

    def sized(multiple: int) -> ModelConfig:
        return matched(name, size, **{**changes, knob: multiple * step})

    least, slope = state_bytes(sized(1)), state_bytes(sized(2)) - state_bytes(sized(1))
    if not slope:
        raise ConfigError(
            f"the state of {name} can't be sized: {knob} does not change it with these settings; "
            "leave out the limit, or what takes the place of the preset's own layers"
        )
    if least > nbytes:
        raise ConfigError(
            f"the state of {name} takes at least {least:,} bytes (with {knob}={step}), got a limit of {nbytes:,}; "
            "use a larger one, or a smaller model"
        )
    return sized(1 + (nbytes - least) // slope)
