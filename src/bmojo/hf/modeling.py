"""A bmojo model as Transformers knows models: `generate`, `Trainer`, `pipeline`, PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bmojo.errors import ConfigError, StateError
from bmojo.hf.cache import BMojoCache
from bmojo.hf.configuration import BMojoConfig
from bmojo.nn.loss import auxiliary_loss, auxiliary_trace, cross_entropy
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM

IGNORED_LABEL = -100  # as everywhere in Transformers


class BMojoForCausalLM(PreTrainedModel, GenerationMixin):
    """`bmojo.BMojoLM` (in `model`) behind the interface of a Transformers causal language model.

        model = BMojoForCausalLM(BMojoConfig.from_core(presets.bmojo("tiny")))
        model = AutoModelForCausalLM.from_pretrained(folder)      # after `import bmojo`

    `past_key_values` is a BMojoCache, made where none is given. `attention_mask` is that of all tokens so far: ones,
    with padding before or after them. Padded or not, in one call or many, a row gives the same.
    """

    config_class = BMojoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `num_items_in_batch`
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    config: BMojoConfig

    def __init__(self, config: BMojoConfig) -> None:
        super().__init__(config)
        self.model = BMojoLM(config.core)
        self.post_init()

    # embeddings
    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where the embeddings are tied, as the model then has none."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.core
        return embeddings

    # initialisation
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring; a module knows how (`reset_parameters`), and draws all that it has."""
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = [(tensor, tensor.clone()) for tensor in own if getattr(tensor, "_is_hf_initialized", False)]
        if len(loaded) < len(own) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
            for tensor, value in loaded:
                tensor.copy_(value)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "use_reentrant must be False: the reentrant form loses gradients through a state; leave it out"
            )
        super().gradient_checkpointing_enable({"use_reentrant": False}, **kwargs)

    # running
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, time, vocab_size] of the token after each, the loss if there are `labels`, and the cache.

        `labels` [batch, time] are shifted inside, as in all of Transformers: labels[:, i] is what tokens up to i - 1
        predict; -100 is left out. `num_items_in_batch` divides the loss in place of the number of labels.
        `position_ids` matter where they start again inside a row (rows of packed documents): each start empties the
        memories, as do changes of `document_ids`. `cache_position` is not needed.
        Raises StateError for a cache of another model, kind or batch size, and for a mask with padding inside a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ConfigError("output_attentions is not available: no layer keeps its attention weights")
        inputs = inputs_embeds if input_ids is None else input_ids
        assert inputs is not None
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        cache = past_key_values
        if cache is not None and not isinstance(cache, BMojoCache):
            raise StateError(
                f"past_key_values must be a BMojoCache, got {type(cache).__name__}; leave it out to have one made"
            )
        read = 0 if cache is None else cache.get_seq_length()
        mask = None if attention_mask is None else _own_mask(attention_mask, inputs, read)
        if document_ids is None and position_ids is not None and mask is None and cache is None:
            document_ids = _documents(position_ids)
        trace = auxiliary_trace(self.model.config) if labels is not None and self.training else None
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if wants_hidden:
            trace = trace or Trace()
            trace.hidden = []
        features, state = self.model.features(
            inputs,
            None if cache is None else cache.take(),
            mask=mask,
            document_ids=document_ids,
            donate=not torch.is_grad_enabled(),
            trace=trace,
        )
        if use_cache:
            cache = BMojoCache() if cache is None else cache
            cache.put(state, inputs.shape[1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(features[:, kept])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ConfigError("labels need the logits of every token; leave logits_to_keep at 0")
            predicted = labels[:, 1:] != IGNORED_LABEL
            loss = cross_entropy(logits[:, :-1][predicted], labels[:, 1:][predicted], num_items_in_batch)
            loss = loss + auxiliary_loss(self.model.config, trace)
        hidden = None
        if wants_hidden:
            assert trace is not None
            assert trace.hidden is not None
            hidden = (*trace.hidden[:-1], features)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache else None, hidden_states=hidden
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    # generation
    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes a BMojoCache

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation must be left out, got {generation_config.cache_implementation!r}: "
                "the memory of a bmojo model has a size of its own"
            )
        generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: BMojoCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        if inputs_embeds is not None and read == 0:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            inputs["input_ids"] = input_ids[:, input_ids.shape[1] - (total - read) :]
        names = ("use_cache", "logits_to_keep", "output_hidden_states", "output_attentions", "return_dict")
        return inputs | {name: kwargs[name] for name in names if name in kwargs}


def _own_mask(attention_mask: Tensor, inputs: Tensor, read: int) -> Tensor | None:
    """The part of the mask [batch, read + time] that belongs to this call's tokens; None if it is all ones."""
    batch, time = inputs.shape[:2]
    if attention_mask.shape != (batch, read + time):
        raise StateError(
            f"attention_mask must be {(batch, read + time)}, [batch, tokens so far], got {tuple(attention_mask.shape)}"
            "; for packed documents give document_ids"
        )
    mask = attention_mask[:, read:].to(torch.bool)
    changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
    if bool((changes > 1).any()):
        row = int((changes > 1).nonzero()[0])
        raise StateError(
            f"attention_mask must be ones with padding before or after them, row {row} is "
            f"{''.join(str(int(one)) for one in mask[row, :40])}; BMojoLM takes padding anywhere (mask=)"
        )
    return None if bool(mask.all()) else mask


def _documents(position_ids: Tensor) -> Tensor | None:
    """[batch, time]: documents counted from 0; None if no row starts again."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return None
    return nn.functional.pad(starts.long().cumsum(1), (1, 0))
