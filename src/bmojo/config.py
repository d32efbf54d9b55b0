"""One frozen, validated configuration of the whole family. Presets (the named corners) are in `bmojo.presets`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bmojo.errors import CheckpointError, ConfigError, nearest

FORMAT_VERSION = 1  # of model folders
# what Transformers and `save` write into a config.json beside the settings
CHECKPOINT_ENTRIES = frozenset({
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "format_version", "id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "quantization_config", "return_dict", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache"})  # fmt: skip
LAYERS = ("attention", "full", "ssm", "bmojo")
SSMS = ("ssd", "gdn", "s6")
FADINGS = ("window", "summary")
POSITIONS = ("true", "compact")
INNOVATIONS = ("rls", "ema", "state", "head", "random", "recent", "first")
ADMISSIONS = ("innovation", "learned")
STORAGE_SIZES = ("storage_block", "storage_keys", "storage_stride", "storage_queries", "storage_blocks")


class Parts(NamedTuple):
    ssm: bool
    attention: bool
    fading: bool
    eidetic: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model of the B'MOJO family.

    `pattern` names the kind of each layer and is repeated over the depth:

    - `"attention"` reads the window alone (`window=None`: the whole past, a Transformer);
    - `"full"` reads the whole past, whatever the window of the other layers;
    - `"ssm"` reads the fading state alone (Mamba-2, gated delta net, Mamba-1);
    - `"bmojo"` reads window, fading tokens and eidetic slots in one softmax.

    Sizes are in tokens. `window`, `fading_span` and the eidetic refresh are counted in whole chunks of `chunk_size`.
    Raises ConfigError for a value out of range, and for a fading span or eidetic slots that no layer of the pattern
    has. `unused` names the settings that the pattern has no use for.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 2
    intermediate_size: int = 384  # SwiGLU width; 0 leaves the MLP out, as Mamba-2 does
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    initializer_range: float | None = None  # None: 1/sqrt(fan_in)
    pattern: tuple[str, ...] = ("bmojo",)

    # attention: the readout of window, fading and eidetic memory
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: num_heads; fewer: grouped-query attention
    head_dim: int = 0  # 0: hidden_size / num_heads
    window: int | None = 64  # the token itself and the window-1 before; None: all
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    conv_size: int = 0  # short causal convolution that keys are made from; 0: none
    tie_sources: bool = True  # one W_q, W_k, W_v for x and y; False: fading tokens get their own, and their own query
    chunk_size: int = 64  # refresh period of the eidetic set, and block of the chunked computation

    # fading memory
    ssm: str = "ssd"
    ssm_expand: int = 1
    ssm_head_dim: int = 32
    ssm_state_size: int = 16
    ssm_dt_rank: int = 0  # of the map that gives s6 its steps; 0: hidden_size / 16, rounded up
    ssm_groups: int = 1  # heads that share B and C (ssd), or q and k (gdn), come in this many groups
    ssm_conv: int = 4
    ssm_norm_eps: float | None = None  # of the norm inside the SSM; None: norm_eps
    fading: str = "window"  # "summary": one y per chunk
    fading_span: int = 0

    # eidetic memory
    eidetic_slots: int = 0
    innovation: str = "rls"
    innovation_dim: int = 32  # rls works on a fixed random projection of the input to this many dimensions
    innovation_forgetting: float = 0.999  # of rls and ema, per token
    head_loss_weight: float = 0.1  # of the auxiliary loss that trains the "head" predictor
    admission: str = "learned"  # to the slots: by the innovation times the odds that the token will be looked at
    admission_loss_weight: float = 0.1  # of the auxiliary loss that trains learned admission
    eidetic_threshold: float = 0.0  # a token with a lower score is not admitted
    eidetic_decay: float = 1.0  # of scores, per token of age
    positions: str = "compact"  # of eidetic and stored keys: bounded distances, or "true"

    # in-storage memory: what layers hand to a store in blocks, and read again when it is found
    storage_layers: tuple[int, ...] = ()  # which layers, counted from 0, -1 being the last
    storage_block: int = 64  # tokens of a block
    storage_keys: int = 4  # tokens of it that it is found by: those of highest score
    storage_stride: int = 16  # tokens that share what was found
    storage_queries: int = 4  # that ask: the first of them and the last tokens before
    storage_blocks: int = 4  # blocks found

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            raise ConfigError(f"pattern must be a list of layer kinds, got {self.pattern!r}; use [{self.pattern!r}]")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        object.__setattr__(self, "storage_layers", tuple(self.storage_layers))
        for name in ("tie_embeddings", "qkv_bias", "qk_norm", "tie_sources"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("norm_eps", "rope_theta", "innovation_forgetting", "head_loss_weight", "eidetic_threshold",
                     "eidetic_decay", "admission_loss_weight", "initializer_range", "ssm_norm_eps"):  # fmt: skip
            value = getattr(self, name)
            optional = name in ("initializer_range", "ssm_norm_eps") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "chunk_size",
                     "ssm_expand", "ssm_head_dim", "ssm_state_size", "ssm_groups", "ssm_conv",
                     "innovation_dim", *STORAGE_SIZES):  # fmt: skip
            self._at_least(name, 1)
        for name in ("intermediate_size", "conv_size", "fading_span", "eidetic_slots", "ssm_dt_rank"):
            self._at_least(name, 0)
        for name, known in (("ssm", SSMS), ("fading", FADINGS), ("positions", POSITIONS), ("innovation", INNOVATIONS),
                            ("admission", ADMISSIONS)):  # fmt: skip
            self._one_of(name, getattr(self, name), known)
        if not self.pattern:
            raise ConfigError(f"pattern must name at least one layer kind, got none; use some of {', '.join(LAYERS)}")
        for kind in self.pattern:
            self._one_of("pattern", kind, LAYERS)
        if len(self.pattern) > self.num_layers:
            raise ConfigError(
                f"pattern has {len(self.pattern)} kinds for num_layers={self.num_layers}; "
                f"use num_layers of at least {len(self.pattern)}"
            )
        if not self.ssm_dt_rank:
            object.__setattr__(self, "ssm_dt_rank", -(-self.hidden_size // 16))
        self._check_attention()
        self._check_memories()
        if self.storage_layers:
            self._check_storage()

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")

    @staticmethod
    def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}; {nearest(str(value), known)}")

    def _check_attention(self) -> None:
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size must be a multiple of num_heads ({self.num_heads}), got {self.hidden_size}; "
                    "or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        self._at_least("head_dim", 2)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (rotary positions turn pairs), got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.ssm != "s6" and any(self.parts(kind).ssm for kind in self.pattern):
            self._check_ssm_heads()

    def _check_ssm_heads(self) -> None:
        if (self.ssm_expand * self.hidden_size) % self.ssm_head_dim:
            raise ConfigError(
                f"ssm_expand * hidden_size ({self.ssm_expand * self.hidden_size}) must be a multiple of "
                f"ssm_head_dim ({self.ssm_head_dim})"
            )
        if self.ssm_heads % self.ssm_groups:
            raise ConfigError(f"the {self.ssm_heads} SSM heads must divide into ssm_groups ({self.ssm_groups})")

    def _check_memories(self) -> None:
        chunk = self.chunk_size
        if self.window is not None:
            self._whole_chunks("window", self.window, least=1)
        self._whole_chunks("fading_span", self.fading_span, least=0)
        if "bmojo" in self.pattern:
            if self.window is None:
                raise ConfigError(f"a bmojo layer needs a finite window, got None; use a multiple of chunk ({chunk})")
        else:
            for name in ("fading_span", "eidetic_slots"):
                if getattr(self, name):
                    raise ConfigError(f"{name}={getattr(self, name)} is used by bmojo layers alone; pattern has none")
        for name in ("innovation_forgetting", "eidetic_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("eidetic_threshold", "head_loss_weight", "admission_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps", "initializer_range", "ssm_norm_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, got {value}")

    def _check_storage(self) -> None:
        chunk, block, stride = self.chunk_size, self.storage_block, self.storage_stride
        layers = []
        for given in self.storage_layers:
            whole = isinstance(given, int) and not isinstance(given, bool)
            if not whole or not -self.num_layers <= given < self.num_layers:
                raise ConfigError(f"storage_layers must name layers 0 to {self.num_layers - 1}, got {given!r}")
            layers.append(given % self.num_layers)
            kind = self.kinds[layers[-1]]
            if kind not in ("attention", "bmojo") or self.window_of(kind) is None:
                raise ConfigError(
                    f"storage_layers: layer {layers[-1]} is {kind!r}{'' if kind == 'ssm' else ' without window'}, "
                    "expected one that reads a window; use a layer of kind 'bmojo' or 'attention', or set window"
                )
        object.__setattr__(self, "storage_layers", tuple(sorted(set(layers))))
        if chunk % stride:
            raise ConfigError(f"storage_stride must divide chunk_size ({chunk}), got {stride}")
        if self.storage_queries > chunk:
            raise ConfigError(f"storage_queries must be at most chunk_size ({chunk}), got {self.storage_queries}")
        if chunk % block and block % chunk:
            raise ConfigError(f"storage_block must divide chunk_size ({chunk}) or be a multiple of it, got {block}")
        if self.storage_keys > block:
            raise ConfigError(f"storage_keys must be at most storage_block ({block}), got {self.storage_keys}")
        assert self.window is not None
        if block > self.window:
            raise ConfigError(
                f"storage_block must be at most the window ({self.window}), or tokens would be in neither, got {block}"
            )

    def _whole_chunks(self, name: str, value: int, *, least: int) -> None:
        chunk = self.chunk_size
        if not isinstance(value, int) or value < least or value % chunk:
            below = max(value // chunk, least) * chunk if isinstance(value, int) else chunk
            raise ConfigError(
                f"{name} must be a {'positive ' if least else ''}multiple of chunk ({chunk}), got {value}; "
                f"use {below} or {below + chunk}"
            )

    def parts(self, kind: str) -> Parts:
        """Which memories a layer of this kind has; what nothing reads is left out."""
        fading = kind == "bmojo" and self.fading_span > 0
        eidetic = kind == "bmojo" and self.eidetic_slots > 0
        reads_ssm = eidetic and self.innovation in ("state", "head")
        return Parts(kind == "ssm" or fading or reads_ssm, kind != "ssm", fading, eidetic)

    def window_of(self, kind: str) -> int | None:
        """The window of a layer of this kind; None: the whole past."""
        return None if kind == "full" else self.window

    @property
    def unused(self) -> set[str]:
        """The settings that no layer of the pattern reads."""
        has = [self.parts(kind) for kind in self.pattern]
        names = {field.name for field in dataclasses.fields(self)}
        idle = set()
        if not any(part.ssm for part in has):
            idle |= {name for name in names if name.startswith("ssm")}
        if not any(part.attention for part in has):
            idle |= {"num_heads", "num_kv_heads", "head_dim", "qkv_bias", "qk_norm", "rope_theta"}
            idle |= {"conv_size"}
        if all(kind in ("ssm", "full") for kind in self.pattern):
            idle.add("window")
        if not any(part.fading for part in has):
            idle |= {"fading", "tie_sources"}
        if not self.storage_layers:
            idle |= set(STORAGE_SIZES)
        if not any(part.eidetic for part in has):
            idle |= {name for name in names if name.startswith(("innovation", "eidetic_", "admission"))}
            idle = idle - {"eidetic_slots"} | {"head_loss_weight"} | (set() if self.storage_layers else {"positions"})
        for name, read in (
            ("admission_loss_weight", self.admission == "learned"),
            ("head_loss_weight", self.innovation == "head"),
            ("innovation_forgetting", self.innovation in ("rls", "ema")),
            ("innovation_dim", self.innovation == "rls"),
            ("ssm_dt_rank", self.ssm == "s6"),
            *((name, self.ssm != "s6") for name in ("ssm_head_dim", "ssm_groups", "ssm_norm_eps")),
        ):
            if not read:
                idle.add(name)
        return idle

    @property
    def has_auxiliary_losses(self) -> bool:
        """Whether some layer has a loss of its own, that trains what chooses its eidetic memory."""
        learned = self.innovation == "head" or self.admission == "learned"
        return learned and any(self.parts(kind).eidetic for kind in self.pattern)

    # derived sizes
    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def ssm_size(self) -> int:
        """Channels inside the SSM."""
        return self.ssm_expand * self.hidden_size

    @property
    def ssm_heads(self) -> int:
        return self.ssm_size // self.ssm_head_dim

    @property
    def fading_stride(self) -> int:
        """Positions between fading tokens: 1, or a chunk for summaries."""
        return self.chunk_size if self.fading == "summary" else 1

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; unknown fields are refused with the nearest name.

        `head_dim`, `num_kv_heads` and `ssm_dt_rank` follow `hidden_size` and `num_heads` where these change and they
        were derived.
        """
        fields = self.to_dict()
        resized = "head_dim" not in changes and {"hidden_size", "num_heads"} & changes.keys()
        if resized and self.head_dim == self.hidden_size // self.num_heads:
            fields["head_dim"] = 0
        if "num_kv_heads" not in changes and "num_heads" in changes and self.num_kv_heads == self.num_heads:
            fields["num_kv_heads"] = 0
        if "hidden_size" in changes and self.ssm_dt_rank == -(-self.hidden_size // 16):
            fields["ssm_dt_rank"] = 0
        return ModelConfig.from_dict({**fields, **changes})

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "pattern": list(self.pattern), "storage_layers": [*self.storage_layers]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; {nearest(name, known)}")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        return cls.from_dict(_json_object(text))

    def to_checkpoint(self) -> dict[str, Any]:
        """What the config.json of a model folder holds: the settings, and how Transformers finds the classes."""
        entries = {"architectures": ["BMojoForCausalLM"], "model_type": "bmojo", "format_version": FORMAT_VERSION}
        return {**entries, **self.to_dict()}

    @classmethod
    def from_checkpoint(cls, content: str | dict[str, Any]) -> ModelConfig:
        """The settings in the config.json of a model folder, by whomever written.

        Raises ConfigError if it is of another kind of model, or newer.
        """
        fields = _json_object(content) if isinstance(content, str) else content
        if (kind := fields.get("model_type", "bmojo")) != "bmojo":
            raise ConfigError(f"model_type must be 'bmojo', got {kind!r}; use `bmojo convert` on the folder first")
        version = fields.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ConfigError(f"format_version is {version!r}, this bmojo reads up to {FORMAT_VERSION}; update bmojo")
        settings = {name: value for name, value in fields.items() if name not in CHECKPOINT_ENTRIES}
        if "format_version" in fields:  # a folder that does not name it is older than learned admission
            settings = {"admission": "innovation", **settings}
        return cls.from_dict(settings)

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """The settings in the config.json at `path`; CheckpointError names it if they can't be had from it."""
        try:
            return cls.from_checkpoint(path.read_text(encoding="utf-8"))
        except (ConfigError, TypeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not a bmojo configuration: {error}") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"the configuration must be a JSON object, got {type(fields).__name__}")
    return fields
