"""What stands between the matrix products of a block: short convolution, RMS norm, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32


def _causal_conv(
    extended: Tensor, weight: Tensor, bias: Tensor | None = None, position: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """Depthwise causal convolution y_t = sum_j w_j x_{t-j} (+ bias), then SiLU if asked for: [batch, time, channels].

    extended [batch, lags + time, channels] begins with the inputs before the first step; weight [channels, lags + 1],
    oldest first. `position` [batch, time] int64 of each step in its document, where documents are packed: no step
    looks beyond its beginning.
    """
    lags = weight.shape[1] - 1
    length = extended.shape[1] - lags
    y = extended[:, lags:] * weight[:, -1]
    for lag in range(1, lags + 1):
        part = extended[:, lags - lag : lags - lag + length] * weight[:, -1 - lag]
        y = y + (part if position is None else part * (position >= lag)[..., None].to(part.dtype))
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y


def _causal_conv_decode(
    x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """One step: x [batch, channels] after the inputs `tail` [batch, lags, channels], which are given up; y like x, and
    the new tail."""
    extended = torch.cat((tail.to(x.dtype), x[:, None]), 1)
    return _causal_conv(extended, weight, bias, silu=silu)[:, 0], extended[:, 1:]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 at least, in the dtype of x."""
    exact = at_least_float32(x)
    return F.rms_norm(exact, weight.shape, weight.to(exact.dtype), eps).to(x.dtype)


def _swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up of x = [gate, up] [..., 2 width].  Source: Shazeer 2020, arXiv 2002.05202."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


causal_conv = dispatched(chunked=_causal_conv, naive=_causal_conv, fused={"cpu": "bmojo.ops.layers_cpu:causal_conv"})
causal_conv_decode = dispatched(
    chunked=_causal_conv_decode, naive=_causal_conv_decode, fused={"cpu": "bmojo.ops.step_cpu:causal_conv_decode"}
)
rms_norm = dispatched(chunked=_rms_norm, naive=_rms_norm, fused={"cpu": "bmojo.ops.layers_cpu:rms_norm"})
swiglu = dispatched(chunked=_swiglu, naive=_swiglu, fused={"cpu": "bmojo.ops.layers_cpu:swiglu"})
