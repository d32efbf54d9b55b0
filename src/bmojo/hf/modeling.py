"""A bmojo model as Transformers knows models: `generate`, `Trainer`, `pipeline`, PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bmojo.data.packing import IGNORED_LABEL
from bmojo.errors import ConfigError, StateError
from bmojo.hf.cache import BMojoCache
from bmojo.hf.configuration import BMojoConfig
from bmojo.nn.loss import auxiliary_loss, auxiliary_trace, cross_entropy
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM


class BMojoForCausalLM(PreTrainedModel, GenerationMixin):
    """`bmojo.BMojoLM` (in `model`) behind the interface of a Transformers causal language model.

        model = BMojoForCausalLM(BMojoConfig.from_core(presets.bmojo("tiny")))
        model = AutoModelForCausalLM.from_pretrained(folder)      # after `import bmojo`

    `past_key_values` is a BMojoCache, made where none is given. `attention_mask` is that of all tokens so far: ones,
    with padding before or after them; that of this call's tokens alone will do. Padded or not, in one call or many, a
    row gives the same.
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
    skip_logits = True  # in training with labels, where `forward` is not told

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
        # `resize_token_embeddings` makes plain ones
        if isinstance(module, nn.Embedding | nn.Linear) and not hasattr(module, "std"):
            nn.init.normal_(module.weight, std=self.config.initializer_range or module.weight.shape[1] ** -0.5)
            return
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = [(tensor, tensor.clone()) for tensor in own if getattr(tensor, "_is_hf_initialized", False)]
        if len(loaded) < len(own) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
            for tensor, value in loaded:
                tensor.copy_(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What every way to switch it on or off comes down to. `gradient_checkpointing_func`: torch's, with options."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ConfigError(
                "use_reentrant must be False: the reentrant form loses gradients through a state; leave it out"
            )
        if every_n_layers != 1:
            raise ConfigError(f"every_n_layers must be 1, got {every_n_layers}: all blocks are checkpointed, or none")
        self.model.gradient_checkpointing = enable
        self.model.checkpoint = partial(gradient_checkpointing_func, use_reentrant=False)

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
        skip_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, time, vocab_size] of the token after each, the loss if there are `labels`, and the cache.

        `labels` [batch, time] are shifted inside, as in all of Transformers: labels[:, i] is what tokens up to i - 1
        predict; -100 is left out. `num_items_in_batch` divides the loss in place of the number of labels.
        In training, the layers' auxiliary losses are added (as means over the same tokens).
        `skip_logits`: with labels, `logits` is None, and the loss is computed without ever holding all of them. If
        None: in training, unless the model's attribute of that name is set to False.
        `position_ids` [batch or 1, time] matter where they start again inside a row (rows of packed documents): each
        start empties the memories, as do changes of `document_ids`.
        `past_key_values` is written to, unless `use_cache` is False.
        Raises StateError for a cache of another model, kind or batch size, and for a mask with padding inside a row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ConfigError("output_attentions is not available: no layer keeps its attention weights")
        inputs = inputs_embeds if input_ids is None else input_ids
        assert inputs is not None
        cache = past_key_values
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is not None and not isinstance(cache, BMojoCache):
            raise StateError(
                f"past_key_values must be a BMojoCache, got {type(cache).__name__}; leave it out to have one made"
            )
        read = 0 if cache is None else cache.get_seq_length()
        mask = None if attention_mask is None else _own_mask(attention_mask, inputs, read)
        if document_ids is None and position_ids is not None:
            document_ids = _documents(position_ids, inputs, mask, read)
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
            donate=use_cache and _may_write(cache),
            trace=trace,
        )
        if use_cache:
            cache = BMojoCache() if cache is None else cache
            cache.put(state, inputs.shape[1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        read_off = features[:, kept]
        if skip_logits is None:
            skip_logits = self.skip_logits and self.training
        logits = None if skip_logits and labels is not None else self.model.logits(read_off)
        loss = None
        if labels is not None:
            if labels.shape != read_off.shape[:2]:
                raise ConfigError(
                    f"labels must be [batch, time], {tuple(inputs.shape[:2])}, got {tuple(labels.shape)} "
                    f"for the logits of {read_off.shape[1]} tokens; leave logits_to_keep at 0"
                )
            count = (labels[:, 1:] != IGNORED_LABEL).sum(1)
            total = count.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
            if logits is None:
                loss = self.model.cross_entropy(read_off.flatten(0, 1), following) / total
            else:
                loss = cross_entropy(logits.flatten(0, 1), following, total)
            loss = loss + auxiliary_loss(trace if self.training else None, count / total)
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
        return False  # but a BMojoCache, see below

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation must be left out, got {generation_config.cache_implementation!r}: "
                "the memory of a bmojo model has a size of its own"
            )
        generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = BMojoCache()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: BMojoCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        next_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` is given of `input_ids`, or of `inputs_embeds` and what came after them: what is new.

        Newer versions of Transformers leave out a mask of ones, and say how many tokens are new if not all are.
        """
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        if inputs_embeds is not None and read < inputs_embeds.shape[1]:
            inputs["inputs_embeds"] = inputs_embeds[:, read:]
        else:
            given = input_ids.shape[1]
            new = given if next_sequence_length is None else next_sequence_length
            if attention_mask is not None:
                new = attention_mask.shape[1] - read
            if not 0 < new <= given:
                raise StateError(
                    f"the cache has read {read} tokens; give `generate` those and new ones, or the new ones "
                    f"and the attention_mask of all; got {given} tokens. BMojoCache(cache.state) takes new ones alone"
                )
            inputs["input_ids"] = input_ids[:, given - new :]
        time = next(inputs[name] for name in ("inputs_embeds", "input_ids") if name in inputs).shape[1]
        if kwargs.get("document_ids") is not None:
            raise ConfigError("generate goes on with one document, got document_ids; give it the last one alone")
        if attention_mask is not None and time > 1:
            ended = attention_mask.bool().any(1) & ~attention_mask[:, -1].bool()
            if bool(ended.any()):
                raise StateError(
                    "generate needs tokens at the end of every row, got padding behind those of row "
                    f"{int(ended.nonzero()[0])}; pad on the left (tokenizer.padding_side = 'left')"
                )
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] >= time:
            inputs["position_ids"] = positions[:, -time:]
        names = ("use_cache", "logits_to_keep", "output_hidden_states", "output_attentions", "return_dict")
        return inputs | {name: kwargs[name] for name in names if name in kwargs}


def _own_mask(attention_mask: Tensor, inputs: Tensor, read: int) -> Tensor | None:
    """The part of the mask [batch, read + time], or [batch, time], that this call's tokens have; None if all ones."""
    batch, time = inputs.shape[:2]
    if not isinstance(attention_mask, Tensor):
        raise StateError(f"attention_mask must be a tensor [batch, tokens so far], got {type(attention_mask).__name__}")
    if attention_mask.shape not in ((batch, read + time), (batch, time)):
        raise StateError(
            f"attention_mask must be {(batch, read + time)}, [batch, tokens so far], or {(batch, time)}, "
            f"got {tuple(attention_mask.shape)}; for packed documents give document_ids"
        )
    if attention_mask.is_floating_point() and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise StateError(
            "attention_mask must be 1 at tokens and 0 at padding, got an additive one; leave that to the model"
        )
    mask = attention_mask[:, -time:].to(torch.bool)
    if bool(mask.all()):
        return None
    changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
    if bool((changes > 1).any()):
        row = int((changes > 1).nonzero()[0])
        raise StateError(
            f"attention_mask must be ones with padding before or after them, row {row} is "
            f"{''.join(str(int(one)) for one in mask[row, :40])}; BMojoLM takes padding anywhere (mask=)"
        )
    return mask


def _may_write(cache: BMojoCache | None) -> bool:
    """Whether a forward pass may write into the state of this cache: not where autograd may need what was there."""
    state = None if cache is None else cache.take()
    frozen = state is not None and state.position.is_inference() and not torch.is_inference_mode_enabled()
    return not torch.is_grad_enabled() and not frozen


def _documents(position_ids: Tensor, inputs: Tensor, mask: Tensor | None, read: int) -> Tensor | None:
    """[batch, time]: documents counted from 0; None if no row starts again. Positions of padding mean nothing.

    Raises ConfigError for positions that leave some out, or start again behind `read` tokens of a cache.
    """
    batch, time = inputs.shape[:2]
    if position_ids.shape not in ((batch, time), (1, time)):
        raise ConfigError(f"position_ids must be [batch, time], {(batch, time)}, got {tuple(position_ids.shape)}")
    again = ConfigError("position_ids start again behind a cache; give document_ids instead, or a new cache")
    first = position_ids[:, 0] == 0
    if read and bool((first if mask is None else first & mask[:, 0]).any()):
        raise again
    if time == 1:  # the token that `generate` adds
        return None
    step = (position_ids[:, 1:] - position_ids[:, :-1]).expand(batch, -1)
    if mask is not None:
        step = step.masked_fill(~(mask[:, 1:] & mask[:, :-1]), 1)
    if bool((step > 1).any()):
        raise ConfigError("position_ids leave some positions out; leave them out, the model counts by itself")
    starts = step < 1
    if not bool(starts.any()):
        return None
    if read:
        raise again
    return nn.functional.pad(starts.long().cumsum(1), (1, 0))
