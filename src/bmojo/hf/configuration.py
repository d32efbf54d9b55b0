"""The configuration of a bmojo model as Transformers keeps it: the fields of ModelConfig, flat in config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from bmojo.config import CHECKPOINT_ENTRIES, FORMAT_VERSION, ModelConfig
from bmojo.errors import ConfigError, nearest

_SETTINGS = frozenset(field.name for field in dataclasses.fields(ModelConfig))
# what PretrainedConfig takes, and from_pretrained passes, without keeping it in its dictionary
_PASSED = {"attn_implementation", "experts_implementation", "name_or_path", "num_labels"}
_KNOWN = _SETTINGS | _PASSED | CHECKPOINT_ENTRIES | set(PretrainedConfig().to_dict())


class BMojoConfig(PretrainedConfig):
    """Every field of `bmojo.ModelConfig` as a keyword and an attribute, beside those of any PretrainedConfig.

    `core` is the validated ModelConfig. The usual names of Transformers (`num_hidden_layers`, `num_attention_heads`,
    `num_key_value_heads`) are aliases. Raises ConfigError for an unknown setting, one out of range, and a checkpoint
    that a newer bmojo wrote.
    """

    model_type = "bmojo"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **fields: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in fields and fields.setdefault(name, fields[alias]) != fields.pop(alias):
                raise ConfigError(f"{alias} and {name} are the same setting, got two values; give one of them")
        others = {name: fields.pop(name) for name in list(fields) if name not in _SETTINGS}
        told = {name: others.pop(name) for name in ("model_type", "format_version") if name in others}
        core = ModelConfig.from_checkpoint(fields | told)
        _require_known(others)
        self.use_cache = others.pop("use_cache", True)
        self.tie_word_embeddings = others.pop("tie_word_embeddings", core.tie_embeddings)
        if self.tie_word_embeddings != core.tie_embeddings:
            raise ConfigError(
                f"tie_word_embeddings is {self.tie_word_embeddings} and tie_embeddings {core.tie_embeddings}; "
                "give tie_embeddings alone"
            )
        super().__init__(**others)
        for name, value in core.to_dict().items():
            setattr(self, name, value)
        self.format_version = FORMAT_VERSION
        _register_model()

    @classmethod
    def from_core(cls, core: ModelConfig, **others: Any) -> BMojoConfig:
        return cls(**core.to_dict(), **others)

    @property
    def core(self) -> ModelConfig:
        """The settings as a frozen, validated ModelConfig."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _SETTINGS})

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Write config.json. Raises ConfigError for an attribute that could not be loaded again."""
        _require_known(self.to_dict())
        return super().save_pretrained(*args, **kwargs)


def _require_known(names: Iterable[str]) -> None:
    for name in names:
        if name not in _KNOWN and not name.startswith("_"):
            raise ConfigError(f"unknown setting {name!r}; {nearest(name, _SETTINGS)}")


def _register_model() -> None:
    """A configuration comes before any model: by now Transformers is loaded, and AutoModel can be told."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from bmojo.hf.modeling import BMojoForCausalLM

    AutoModelForCausalLM.register(BMojoConfig, BMojoForCausalLM, exist_ok=True)
    # `register` leaves this list out, by which Trainer and PEFT know whose labels the model's own loss shifts
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[BMojoConfig.model_type] = BMojoForCausalLM.__name__
