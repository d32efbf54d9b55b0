"""A model of Transformers with no trivial weight, and ours with the same weights; what the two must agree in.

Transformers takes norms, rotary angles, softmax and scans in float32 even in a float64 model. To compare in float64 its
own code runs unchanged but for those casts: inside `in_float64` the names `torch.float32`, `torch.float` and
`Tensor.float` mean float64 in the model's file. Nothing else of it is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from cases import draw_tokens, shaken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from bmojo.convert import import_model
from bmojo.nn.model import BMojoLM

EXACT = 1e-9


class _Lifted(ModuleType):
    """The module torch, in which float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextmanager
def in_float64(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, the code of this model of Transformers computes in float64 throughout."""
    name = config.model_type
    file = f"transformers.models.{name}.modeling_{name}"
    __import__(file)
    with (
        mock.patch.object(sys.modules[file], "torch", _Lifted("torch")),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


class Outcome(NamedTuple):
    """gradients: of the loss, by the name of the parameter."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def make_theirs(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    with in_float64(config):
        return shaken(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed).eval()


def run_theirs(model: nn.Module, tokens: Tensor) -> Outcome:
    model.zero_grad()
    with in_float64(model.config):
        out = model(tokens, labels=tokens, use_cache=False)
        out.loss.backward()
    assert out.logits.dtype == out.loss.dtype == torch.float64
    return Outcome(out.logits.detach(), out.loss.detach(), gradients(model))


def run_ours(model: BMojoLM, tokens: Tensor) -> Outcome:
    logits, _ = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return Outcome(logits.detach(), loss.detach(), gradients(model))


def one_by_one(model: BMojoLM, tokens: Tensor) -> Tensor:
    """The logits of a model that is given one token a call."""
    state, logits = model.empty_state(tokens.shape[0]), []
    with torch.no_grad():
        for token in tokens.split(1, 1):
            out, state = model(token, state)
            logits.append(out)
    return torch.cat(logits, 1)


def agree(got: Tensor, expected: Tensor, name: str, tolerance: float = EXACT) -> None:
    """No element is off by more than the tolerance times the largest."""
    assert got.shape == expected.shape, name
    size = float(expected.abs().max())
    assert size > 0, f"{name} is all zero: nothing is compared"
    off = float((got - expected).abs().max()) / size
    assert off <= tolerance, f"{name} is off by {off:.1e}"


def compare(ours: Outcome, theirs: Outcome, tolerance: float = EXACT) -> None:
    agree(ours.logits, theirs.logits, "logits", tolerance)
    agree(ours.loss, theirs.loss, "loss", tolerance)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        agree(ours.gradients[name], gradient, f"gradient of {name}", tolerance)


def convert_and_compare(config: PreTrainedConfig, tokens: Tensor | None = None) -> BMojoLM:
    """Logits, loss, every gradient, and decoding one token at a time."""
    tokens = draw_tokens(2, 37) if tokens is None else tokens
    theirs = make_theirs(config)
    settings, ours_config, tensors = config.to_dict(), *import_model(config.to_dict(), theirs.state_dict())
    ours = BMojoLM(ours_config).double()
    ours.load_state_dict(tensors)
    expected = run_theirs(theirs, tokens)
    _, mapped = import_model(settings, expected.gradients)  # linear: gradients map as weights do
    compare(run_ours(ours, tokens), expected._replace(gradients=mapped))
    agree(one_by_one(ours, tokens), expected.logits, "logits, one token at a time")
    return ours
