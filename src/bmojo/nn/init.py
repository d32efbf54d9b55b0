"""Initialisation, and the roles of parameters.

A module names in `no_decay` those of its own parameters that weight decay must leave alone: decay rates, biases, norms,
convolutions. One that has parameters or buffers of its own draws them in `reset_parameters`, which is also how memory
that was allocated without values (meta device, sharded models) is filled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo.ops.cross_entropy import linear_cross_entropy
from bmojo.ops.layers import causal_conv, causal_conv_decode, rms_norm
from bmojo.ops.numerics import at_least_float32

RESIDUAL_SCALE = 0.1  # see docs/decisions.md


def decays(model: nn.Module) -> dict[str, bool]:
    """Whether weight decay applies to each parameter of a model, by name."""
    exempt = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "no_decay", ())
    }
    return {name: name not in exempt for name, _ in model.named_parameters()}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: parameters that decay, and those declared not to."""
    role = decays(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if role[name]], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trained if not role[name]], "weight_decay": 0.0},
    ]


class Linear(nn.Linear):
    """A linear map, its weights drawn from N(0, std^2); std = 1/sqrt(fan_in) if None. A bias starts at zero."""

    no_decay = ("bias",)

    def __init__(self, inputs: int, outputs: int, std: float | None = None, *, bias: bool = False) -> None:
        self.std = inputs**-0.5 if std is None else std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Output(Linear):
    """A linear map back into the residual stream. It starts small, so that a block first passes on what it gets."""

    def __init__(self, inputs: int, outputs: int, std: float | None = None) -> None:
        super().__init__(inputs, outputs, (inputs**-0.5 if std is None else std) * RESIDUAL_SCALE)


class Head(Linear):
    """Logits [..., outputs] of vectors [..., inputs]; or, given `labels` [n] for vectors [n, inputs], the sum of their
    cross entropy (see `bmojo.ops.cross_entropy`)."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x) if labels is None else linear_cross_entropy(x, self.weight, labels)


class Embedding(nn.Embedding):
    """A row of `size` numbers for each token, drawn from N(0, std^2); std = 1/sqrt(size) if None.

    Given vectors [..., size] in place of tokens it is the head of a model that ties its own to the embedding (`Head`).
    It is called, as any head is, because a module that is sharded has its whole weight only then.
    """

    def __init__(self, tokens: int, size: int, std: float | None = None) -> None:
        self.std = size**-0.5 if std is None else std
        super().__init__(tokens, size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            return linear_cross_entropy(x, self.weight, labels)
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, or over each of `groups` equal parts of it."""

    no_decay = ("weight",)

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__(size, eps=eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return rms_norm(x, self.weight, self.eps)
        exact = at_least_float32(x)
        parts = exact.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight.to(exact.dtype)).to(x.dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution y_t = sum_j w_j x_{t-j} (+ bias) over `size` tokens of one document."""

    no_decay = ("weight", "bias")

    def __init__(self, channels: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))  # oldest token first
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def lags(self) -> int:
        return self.weight.shape[1] - 1

    def forward(self, extended: Tensor, position: Tensor | None = None, *, silu: bool = False) -> Tensor:
        """[B, lags + L, channels] -> [B, L, channels]. `position` [B, L]: given where documents are packed."""
        return causal_conv(extended, self.weight, self.bias, position, silu=silu)

    def step(self, x: Tensor, tail: Tensor, *, silu: bool = False) -> tuple[Tensor, Tensor]:
        """One token x [B, channels] after the inputs `tail` [B, lags, channels], which are given up."""
        return causal_conv_decode(x, tail, self.weight, self.bias, silu=silu)


class KeyConv(CausalConv):
    """The convolution that keys are made from. It starts near the token before, so that at initialisation q_i . k_j
    compares token i with what came before token j: a stored value is found under the key that it followed, and a layer
    can recall at once what it would first have to learn to bind."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.lags:
            self.weight.mul_(0.2)[:, -2] += 1
