"""One token on CPUs in C++ (step_cpu.cpp), without gradients: states are written in place, and nothing else is kept.

Importing this module compiles it once; ImportError says why that can't be done here. Where gradients are wanted, in
graphs of a compiler, and for dtypes that are mixed or below float32, the forms in PyTorch run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmojo.ops import attention, gated_delta, innovation, layers, s6, ssd
from bmojo.ops.native import load_ops

load_ops("step_cpu.cpp")
_ops = torch.ops.bmojo
_written = torch.autograd.graph.increment_version  # who keeps a tensor for its gradients is told if it was written to


def _ready(state: Tensor, *others: Tensor | None) -> bool:
    tensors = [state, *(z for z in others if z is not None)]
    plain = (
        not torch.compiler.is_compiling() and state.is_contiguous() and state.dtype in (torch.float32, torch.float64)
    )
    grad = torch.is_grad_enabled() and any(z.requires_grad for z in tensors)
    return plain and not grad and all(z.dtype == state.dtype for z in tensors)


def ssd_decode(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `bmojo.ops.ssd.ssd_step`, on `state`, which is written in place."""
    if not _ready(state, x, dt, A_log, B, C):
        return ssd.ssd_step(x, dt, A_log, B, C, state=state)
    y = _ops.ssd_step(state, *(z.contiguous() for z in (x, dt, A_log.exp(), B, C)))
    _written(state)
    return y, state


def s6_decode(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `bmojo.ops.s6.s6_step`, on `state`, which is written in place: by PyTorch, whose exponentials are fast."""
    if not _ready(state, x, dt, A_log, B, C):
        return s6.s6_step(x, dt, A_log, B, C, state=state)
    state.mul_((dt[:, None] * -A_log.exp().T).exp_()).addcmul_(B[..., None], (x * dt)[:, None])
    return (C[:, None] @ state).squeeze(1), state


def gated_delta_decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As `bmojo.ops.gated_delta.gated_delta_step`, on `state`, which is written in place."""
    if not _ready(state, q, k, v, beta, g):
        return gated_delta.gated_delta_step(q, k, v, beta, g, state=state)
    o = _ops.gated_delta_step(state, *(z.contiguous() for z in (q, k, v, beta, g)))
    _written(state)
    return o, state


def causal_conv_decode(
    x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """As `bmojo.ops.layers.causal_conv_decode`, on `tail`, which is written in place."""
    if not _ready(tail, x, weight, bias):
        return layers._causal_conv_decode(x, tail, weight, bias, silu=silu)
    bias = None if bias is None else bias.contiguous()
    y = _ops.conv_step(tail, x.contiguous(), weight.contiguous(), bias, silu)
    _written(tail)
    return y, tail


def rls_decode(
    k: Tensor, A: Tensor, M: Tensor, ends_chunk: Tensor, *, forgetting: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `bmojo.ops.innovation.rls_step`, on A and M, which are written in place."""
    if not (_ready(A, M, k) and M.is_contiguous()):
        return innovation.rls_step(k, A, M, ends_chunk, forgetting=forgetting)
    options = forgetting, innovation.RLS_RIDGE, innovation.RLS_CONDITION
    score = _ops.rls_step(A, M, k.contiguous(), ends_chunk.contiguous(), *options)
    _written((A, M))
    return score, A, M


def put(rows: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """As `bmojo.ops.attention.put`."""
    if not _ready(rows, value):
        return attention._put(rows, index, value)
    _ops.put(rows, index.contiguous(), value.contiguous())
    _written(rows)
    return rows


def attend_rows(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """As `bmojo.ops.attention.attend_rows`."""
    if not _ready(q, *keys, *values):
        return attention._attend_rows(q, keys, values, masks)
    parts = ([z.contiguous() for z in part] for part in (keys, values, masks))
    return _ops.attend_step(q, *parts)


@torch.library.register_fake("bmojo::ssd_step")
def _(state, x, dt, rate, B, C):
    return torch.empty_like(x)


@torch.library.register_fake("bmojo::gated_delta_step")
def _(state, q, k, v, beta, g):
    return torch.empty_like(v)


@torch.library.register_fake("bmojo::conv_step")
def _(tail, x, weight, bias, silu):
    return torch.empty_like(x)


@torch.library.register_fake("bmojo::put")
def _(rows, index, value):
    return None


@torch.library.register_fake("bmojo::attend_step")
def _(q, k, v, visible):
    return q.new_empty(*q.shape[:2], v[0].shape[-1])


@torch.library.register_fake("bmojo::rls_step")
def _(A, M, k, ends, forgetting, ridge, condition):
    return k.new_empty(k.shape[0])
