"""Mamba-1's selective scan on CPUs in C++ (s6_cpu.cpp), float32: vectorised over channels, threads over rows and tiles
of 64 channels. Forward keeps the state of every 32nd step, backward recomputes those between.

Importing this module compiles it once; ImportError says why that can't be done here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops.native import load_ops
from bmojo.ops.numerics import at_least_float32, exact
from bmojo.ops.s6 import s6_chunked

load_ops("s6_cpu.cpp")
SPAN, TILE = 32, 64  # as in s6_cpu.cpp


@exact
def s6(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `bmojo.ops.s6`. The chunked form runs for float64, for no tokens, and for gradients of `exclusive` reads."""
    args = [at_least_float32(z) for z in (x, dt, A_log, B, C, *(() if state is None else (state,)))]
    grad = torch.is_grad_enabled() and any(z.requires_grad for z in args)
    if (exclusive and grad) or x.shape[1] == 0 or any(z.dtype != torch.float32 for z in args):
        options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
        return s6_chunked(x, dt, A_log, B, C, **options)
    args[2] = -args[2].exp().T
    x, dt, A, B, C, *initial = (z.contiguous() for z in args)
    h = initial[0] if initial else None
    resets = None if resets is None else resets.contiguous()
    y, final, _ = torch.ops.bmojo.s6_forward(x, dt, A, B, C, h, resets, chunk_size, exclusive, grad)
    return y, final


@torch.library.register_fake("bmojo::s6_forward")
def _(x, dt, A, B, C, state, resets, chunk_size, exclusive, keep):
    batch, time, channels = x.shape
    size = B.shape[-1]
    spans = (time + SPAN - 1) // SPAN if keep else 0
    return (
        torch.empty_like(x),
        x.new_empty(batch, size, channels),
        x.new_empty(batch, spans, size, channels),
    )


@torch.library.register_fake("bmojo::s6_backward")
def _(dy, dfinal, x, dt, A, B, C, starts, resets, chunk_size):
    batch, _, channels = x.shape
    size = B.shape[-1]
    tiles = (channels + TILE - 1) // TILE
    state = x.new_empty(batch, size, channels)
    shared = x.new_empty(tiles, *B.shape)
    return torch.empty_like(x), torch.empty_like(x), state, shared, torch.empty_like(shared), torch.empty_like(state)


def _save(ctx, inputs, output):
    x, dt, A, B, C, state, resets, chunk_size, *_ = inputs
    ctx.save_for_backward(x, dt, A, B, C, output[2], resets)
    ctx.chunk_size, ctx.has_state = chunk_size, state is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    x, dt, A, B, C, starts, resets = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dfinal = torch.zeros_like(starts[:, 0]) if dfinal is None else dfinal.contiguous()
    dx, ddt, dA, dB, dC, dstate = torch.ops.bmojo.s6_backward(
        dy, dfinal, x, dt, A, B, C, starts, resets, ctx.chunk_size
    )
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dstate if ctx.has_state else None, None, None, None, None


torch.library.register_autograd("bmojo::s6_forward", _backward, setup_context=_save)
