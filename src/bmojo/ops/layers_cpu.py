"""`bmojo.ops.layers` and `bmojo.ops.rope.rotate` on CPUs in C++ (layers_cpu.cpp), each in one pass over its data.

Importing this module compiles it once; ImportError says why that can't be done here. Dtypes that are mixed or below
float32 take the forms in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops import layers, rope
from bmojo.ops.native import differentiable_once, load_ops

load_ops("layers_cpu.cpp")
_ops = torch.ops.bmojo
_library = torch.library


def _alike(*tensors: Tensor | None) -> bool:
    kinds = {z.dtype for z in tensors if z is not None}
    return len(kinds) == 1 and kinds <= {torch.float32, torch.float64}


def causal_conv(
    extended: Tensor, weight: Tensor, bias: Tensor | None = None, position: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """As `bmojo.ops.layers.causal_conv`."""
    if not _alike(extended, weight, bias):
        return layers._causal_conv(extended, weight, bias, position, silu=silu)
    bias, position = (None if z is None else z.contiguous() for z in (bias, position))
    return _ops.conv_forward(extended.contiguous(), weight.contiguous(), bias, position, silu)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `bmojo.ops.layers.rms_norm`."""
    if not _alike(x, weight):
        return layers._rms_norm(x, weight, eps)
    return _ops.norm_forward(x.contiguous(), weight.contiguous(), eps)[0]


def swiglu(x: Tensor) -> Tensor:
    """As `bmojo.ops.layers.swiglu`."""
    return _ops.swiglu_forward(x.contiguous()) if _alike(x) else layers._swiglu(x)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """As `bmojo.ops.rope.rotate`."""
    cos, sin = (z.contiguous() for z in table)
    rows = x.shape[: cos.ndim - 2]
    if not _alike(x, cos, sin) or cos.shape[:-2] not in (rows, (1, *rows[1:])):
        return rope._rotate(x, table)
    return _ops.rotate(x.contiguous(), cos, sin, False)


@_library.register_fake("bmojo::conv_forward")
def _(extended, weight, bias, position, silu):
    return extended.new_empty(extended.shape[0], extended.shape[1] - weight.shape[1] + 1, extended.shape[2])


@_library.register_fake("bmojo::conv_backward")
def _(dy, extended, weight, bias, position, silu):
    return torch.empty_like(extended), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save_conv(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx, dy):
    extended, weight, bias, position = ctx.saved_tensors
    dx, dw, db = _ops.conv_backward(dy.contiguous(), extended, weight, bias, position, ctx.silu)
    return dx, dw, None if bias is None else db, None, None


@_library.register_fake("bmojo::rotate")
def _(x, cos, sin, back):
    return torch.empty_like(x)


def _save_rotate(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx, dy):
    return _ops.rotate(dy.contiguous(), *ctx.saved_tensors, not ctx.back), None, None, None


@_library.register_fake("bmojo::norm_forward")
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])


@_library.register_fake("bmojo::norm_backward")
def _(dy, x, weight, inverse):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_norm(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx, dy, _):
    return *_ops.norm_backward(dy.contiguous(), *ctx.saved_tensors), None


@_library.register_fake("bmojo::swiglu_forward")
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_library.register_fake("bmojo::swiglu_backward")
def _(dy, x):
    return torch.empty_like(x)


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, dy):
    return _ops.swiglu_backward(dy.contiguous(), *ctx.saved_tensors)


for name in ("conv_backward", "norm_backward", "swiglu_backward"):
    differentiable_once(name)
_library.register_autograd("bmojo::conv_forward", _conv_backward, setup_context=_save_conv)
_library.register_autograd("bmojo::rotate", _rotate_backward, setup_context=_save_rotate)
_library.register_autograd("bmojo::norm_forward", _norm_backward, setup_context=_save_norm)
_library.register_autograd("bmojo::swiglu_forward", _swiglu_backward, setup_context=_save_swiglu)
