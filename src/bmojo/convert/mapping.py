"""What a checkpoint format is, and the two ways through it: one declaration serves both.

A `Format` names the settings of its config.json and, layer by layer, its tensors, each beside ours. `import_model` and
`export_model` are pure functions of a configuration and its tensors; what either side can't hold is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import BMojoError, ConfigError, nearest

Shape = tuple[int, ...]
Settings = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
REQUIRED = object()
# chunks of at most a quarter of the window, as a query reads window + chunk keys, but no smaller than SMALL_CHUNK
MAX_CHUNK, SMALL_CHUNK, MIN_CHUNK = 256, 64, 16
# what a stored file may hold besides its weights: frequencies that follow from rope_theta
DERIVED = (".rotary_emb.inv_freq",)
# settings of other families that change what a model computes: those of their values that don't, and what they are
FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((), "quantised weights"),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"), ((0, 1), "experts")
    ),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), ((), "soft-capping of logits")),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
        ((1,), "scaling of activations"),
    ),
}


class ConversionError(BMojoError):
    """A checkpoint that can't be read, or that the format asked for can't hold."""


class Field(NamedTuple):
    """One setting under both names. `default` is what the format assumes where it is missing or null."""

    theirs: str
    ours: str
    default: Any = REQUIRED


class Rule(NamedTuple):
    """Our tensor is theirs, one under the other (`theirs`: name and shape; None: ours), in the order `rows`.

    A row that `rows` names several times is shared by several of our heads; on the way back its copies must agree.
    Both ends are read as [rows, *our other dimensions], so that a convolution's [C, 1, K] is our [C, K].
    """

    ours: str
    theirs: tuple[tuple[str, Shape | None], ...]
    rows: Tensor | None = None


class Names(NamedTuple):
    """Their modules around the mixers: those of the model, and those of layer {i}."""

    embed: str
    norm: str
    layer: str
    mixer_norm: str
    mlp_norm: str = ""
    mlp: str = ""


class Reading:
    """A config.json as it is being read; `refuse` notes what our family can't hold. `window`: the one that is forced
    on its layers."""

    def __init__(self, settings: Settings, window: int | None = None, reasons: list[str] | None = None) -> None:
        self.settings, self.window = settings, window
        self.reasons = [] if reasons is None else reasons

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.settings.get(name)
        if value is None and default is REQUIRED:
            self.refuse(f"{name} is missing")
        return default if value is None else value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number; where there is none that is noted, and 1 lets the rest be read."""
        value = self.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
        if value is not REQUIRED:
            self.refuse(f"{name}={value!r} (expected a number)")
        return 1

    def count(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number of at least 1, or the default, likewise."""
        value = self.number(name, default)
        if isinstance(value, int) and (value >= 1 or value == default):
            return value
        self.refuse(f"{name}={value!r} (expected a whole number of at least 1)")
        return 1

    def section(self, name: str) -> Reading:
        """The settings of an object inside; what is refused there is refused here."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(f"{name}={value!r} (expected an object)")
        return Reading(value if isinstance(value, dict) else {}, self.window, self.reasons)

    def refuse(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


_READERS: dict[str, Callable[..., Any]] = {"int": Reading.count, "float": Reading.number, "bool": Reading.get}
_TYPES = {setting.name: str(setting.type) for setting in dataclasses.fields(ModelConfig)}


@dataclass(frozen=True)
class Format:
    """A family of checkpoints. `name`: its model_type. `fields`: settings that have another name there. `fixed`: their
    settings that we have one value of. `read_layers` and `write_layers`: the settings that need more than a name.
    `mixers`: the tensors of a layer of each kind, named from the mixer and from their layer on."""

    name: str
    architecture: str
    names: Names
    fields: tuple[Field, ...]
    read_layers: Callable[[Reading, dict[str, Any]], dict[str, Any]]
    write_layers: Callable[[ModelConfig], dict[str, Any]]
    mixers: Mapping[str, Callable[[ModelConfig], Iterator[Rule]]]
    fixed: Settings = field(default_factory=dict)

    def read(self, settings: Settings, window: int | None = None) -> ModelConfig:
        """Our configuration, in which every attention layer has the window that is forced; ConversionError names
        everything that we can't hold. No weight is looked at."""
        return force_window(self.read_stored(settings, window), window)

    def read_stored(self, settings: Settings, window: int | None = None) -> ModelConfig:
        """The same with the layers over the whole past as they are: that by which the tensors are named."""
        reading = Reading(settings, window)
        config = self._read(reading)
        if config is None:
            raise ConversionError(f"this {self.name} can't be held by bmojo: {'; '.join(reading.reasons)}")
        return config

    def _read(self, reading: Reading) -> ModelConfig | None:
        refuse_features(reading)
        for name, value in self.fixed.items():
            if (got := reading.get(name, value)) != value:
                reading.refuse(f"{name}={got!r}; only {value!r} can be held")
        ours = {f.ours: _READERS[_TYPES[f.ours]](reading, f.theirs, f.default) for f in self.fields}
        if not reading.reasons:
            ours |= self.read_layers(reading, ours)
        if reading.reasons:
            return None
        if reading.window is not None and ours["window"] is not None and "bmojo" not in ours["pattern"]:
            ours["window"] = reading.window
        try:
            return ModelConfig.from_dict({**ours, "chunk_size": chunk_size(ours["window"])})
        except (ConfigError, ConversionError) as error:
            reading.refuse(str(error))
            return None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their config.json; ConversionError names the settings that it can't hold."""
        theirs = {f.theirs: getattr(config, f.ours) for f in self.fields}
        theirs = {**self.fixed, **theirs, **self.write_layers(config)}
        theirs |= {"model_type": self.name, "architectures": [self.architecture]}
        reading = Reading(theirs)
        back = self._read(reading)
        if lost := reading.reasons if back is None else differences(config, back):
            raise ConversionError(f"{self.name} can't hold {'; '.join(lost)}")
        return theirs

    def rules(self, config: ModelConfig) -> Iterator[Rule]:
        """Every tensor of the model, under both names."""
        names, vocabulary = self.names, (config.vocab_size, config.hidden_size)
        yield Rule("embed.weight", ((names.embed, vocabulary),))
        yield Rule("norm.weight", ((names.norm, None),))
        if not config.tie_embeddings:
            yield Rule("head.weight", (("lm_head.weight", vocabulary),))
        for i, kind in enumerate(layer_kinds(config)):
            ours, theirs = f"blocks.{i}.", names.layer.format(i=i)
            yield Rule(f"{ours}mixer_norm.weight", ((f"{theirs}{names.mixer_norm}.weight", None),))
            for rule in self.mixers[kind](config):
                yield Rule(
                    f"{ours}mixer.{rule.ours}",
                    tuple((f"{theirs}{name}", shape) for name, shape in rule.theirs),
                    rule.rows,
                )
            if config.intermediate_size:
                wide, mlp = (config.intermediate_size, config.hidden_size), f"{theirs}{names.mlp}."
                yield Rule(f"{ours}mlp_norm.weight", ((f"{theirs}{names.mlp_norm}.weight", None),))
                yield Rule(f"{ours}mlp.gate_up.weight", tuple((f"{mlp}{n}_proj.weight", wide) for n in ("gate", "up")))
                yield Rule(f"{ours}mlp.down.weight", ((f"{mlp}down_proj.weight", None),))


def refuse_features(reading: Reading) -> None:
    """Note what a model computes that no family of ours does."""
    for name, (neutral, what) in FEATURES.items():
        value = reading.settings.get(name)
        if value is not None and value not in neutral:
            reading.refuse(f"{name} ({what})" if isinstance(value, dict) else f"{name}={value!r} ({what})")


def differences(config: ModelConfig, back: ModelConfig) -> list[str]:
    """What `config` has and its copy `back` has not, of all that changes the function that is computed."""
    silent = config.unused | {"pattern", "num_layers", "chunk_size", "initializer_range"}
    then = back.to_dict() | {"ssm_norm_eps": inner_eps(back)}
    lost = [
        f"{name}={value!r} (it would be {then[name]!r})"
        for name, value in (config.to_dict() | {"ssm_norm_eps": inner_eps(config)}).items()
        if name not in silent and value != then[name]
    ]
    if config.kinds != back.kinds and layer_kinds(config) != layer_kinds(back):
        lost.insert(0, f"layers of the kinds {', '.join(sorted(set(config.kinds)))}")
    return lost


def layer_kinds(config: ModelConfig) -> list[str]:
    """The kind of each layer, where attention without a window is "full" by whichever name."""
    return ["full" if kind == "attention" and config.window is None else kind for kind in config.kinds]


def inner_eps(config: ModelConfig) -> float:
    """The epsilon of the norm inside the SSM."""
    return config.norm_eps if config.ssm_norm_eps is None else config.ssm_norm_eps


def layers(kinds: Sequence[str], window: int | None) -> dict[str, Any]:
    """`pattern` and `window` of layers of these kinds; a stack without a window is plain "attention"."""
    if not {"attention", "bmojo"} & set(kinds):
        kinds, window = ["attention" if kind == "full" else kind for kind in kinds], None
    return {"pattern": shortest_pattern(kinds), "window": window}


def force_window(config: ModelConfig, window: int | None) -> ModelConfig:
    """The same model with this window for all of its attention layers; None leaves it as it is.

    Raises ConversionError where no layer attends, and for bmojo layers of another window.
    """
    if window is None:
        return config
    kinds = layer_kinds(config)
    if set(kinds) == {"ssm"}:
        raise ConversionError(f"window={window} can't be forced: no layer attends")
    if "attention" in kinds and config.window is not None and window > config.window:
        raise ConversionError(f"window={window} can't be forced: it is wider than the model's own, {config.window}")
    if "bmojo" in kinds and window != config.window:
        raise ConversionError(f"window={window} can't be forced: bmojo layers keep theirs, which is {config.window}")
    pattern = shortest_pattern(["attention" if kind == "full" else kind for kind in kinds])
    chunk = config.chunk_size if window == config.window else chunk_size(window)
    return config.replace(pattern=pattern, window=window, chunk_size=chunk)


def chunk_size(window: int | None) -> int:
    """A divisor of the window: the largest up to a quarter of it, within the bounds above.

    Raises ConversionError for a window of which no chunk of a useful size is a divisor.
    """
    if window is None:
        return SMALL_CHUNK
    if not isinstance(window, int) or window < 1:
        raise ConversionError(f"window must be a whole number of at least 1, got {window!r}")
    limit = min(window, max(SMALL_CHUNK, min(window // 4, MAX_CHUNK)))
    chunk = next(size for size in range(limit, 0, -1) if window % size == 0)
    if chunk < min(window, MIN_CHUNK):
        below = window // MIN_CHUNK * MIN_CHUNK
        raise ConversionError(
            f"no chunk of {MIN_CHUNK} to {MAX_CHUNK} tokens divides the window {window}; force one with window={below}"
        )
    return chunk


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives these kinds of layers."""
    sizes = range(1, len(kinds) + 1)
    size = next(n for n in sizes if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[:size])


def our_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The tensors of our model and their shapes."""
    from bmojo.nn.model import BMojoLM

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in BMojoLM(config).state_dict().items()}


def check_tensors(format: Format, config: ModelConfig, header: Mapping[str, tuple[Shape, Any]]) -> None:
    """ConversionError unless the tensors (shape and dtype by name) are those of the format, no more and no fewer."""
    ours = our_shapes(config)
    expected = {
        name: ours[rule.ours] if shape is None else shape
        for rule in format.rules(config)
        for name, shape in rule.theirs
    }
    if config.tie_embeddings and "lm_head.weight" in header:
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    given = {name: entry for name, entry in header.items() if not name.endswith(DERIVED)}
    wrong = [
        *(f"{name} is missing" for name in expected if name not in given),
        *(f"{name} is unknown in a {format.name}" for name in given if name not in expected),
        *(
            f"{name} has the shape {shape}, expected {expected[name]}"
            for name, (shape, _) in given.items()
            if name in expected and shape != expected[name]
        ),
        *(
            f"{name} is {dtype}: quantised, expected float16, bfloat16, float32 or float64"
            for name, (_, dtype) in given.items()
            if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ),
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ConversionError(f"its tensors are not those that its config.json tells of: {'; '.join(wrong[:5])}{more}")


def header_of(tensors: Tensors) -> dict[str, tuple[Shape, Any]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def find_format(formats: Mapping[str, Format], settings: Settings) -> Format:
    """The format of a config.json, by its model_type."""
    name = str(settings.get("model_type"))
    if name in formats:
        return formats[name]
    reading = Reading(settings)
    refuse_features(reading)
    reasons = "".join(f"; it has {reason}" for reason in reading.reasons)
    raise ConversionError(f"model_type {name!r} can't be held by bmojo{reasons}; {nearest(name, formats)}")


def import_tensors(format: Format, config: ModelConfig, tensors: Tensors) -> dict[str, Tensor]:
    """Our tensors out of theirs. Linear, so that it maps gradients too."""
    tail = {name: shape[1:] for name, shape in our_shapes(config).items()}
    ours = {}
    for rule in format.rules(config):
        parts = [tensors[name].reshape(-1, *tail[rule.ours]) for name, _ in rule.theirs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        ours[rule.ours] = whole if rule.rows is None else whole[rule.rows]
    head = tensors.get("lm_head.weight") if config.tie_embeddings else None
    if head is not None and not torch.equal(head, ours["embed.weight"]):
        raise ConversionError("tie_word_embeddings is true, but lm_head.weight is not the embedding")
    return ours


def export_tensors(format: Format, config: ModelConfig, tensors: Tensors) -> dict[str, Tensor]:
    """Their tensors out of ours."""
    theirs = {}
    for rule in format.rules(config):
        whole = tensors[rule.ours]
        shapes = [tuple(whole.shape) if shape is None else shape for _, shape in rule.theirs]
        if rule.rows is not None:
            packed = whole.new_empty(int(rule.rows.max()) + 1, *whole.shape[1:])
            packed[rule.rows] = whole
            if not torch.equal(packed[rule.rows], whole):
                raise ConversionError(f"{format.name} shares rows of {rule.ours} between heads; here they differ")
            whole = packed
        sizes = [torch.Size(shape).numel() // (whole[0].numel()) for shape in shapes]
        for (name, _), shape, part in zip(rule.theirs, shapes, whole.split(sizes), strict=True):
            theirs[name] = part.reshape(shape).contiguous()
    return theirs
