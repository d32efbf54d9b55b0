"""Selective scan of Mamba-1: every channel d has its own decay rate for each state n.

    h_t[n, d] = exp(-dt_t[d] * exp(A_log[d, n])) * h_{t-1}[n, d] + dt_t[d] * B_t[n] * x_t[d]
    y_t[d] = sum_n C_t[n] * h_t[n, d]

Shapes: x [batch, time, channels]; dt like x, after softplus, 0 for a padded step; A_log [channels, state_size];
B, C [batch, time, state_size]; state [batch, state_size, channels] or None for zeros; resets
[batch, time / chunk_size] bool or None: True where a chunk starts a new document, with an empty state.
`exclusive=True` reads before it writes, y_t = C_t^T h_{t-1}: what the past predicts.
Returns y like x, and the final state; both float32 (float64 if x is).
Source: Gu and Dao 2023, arXiv 2312.00752, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32, exact


@exact
def s6_naive(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one step at a time."""
    x, dt, A_log, B, C = map(at_least_float32, (x, dt, A_log, B, C))
    h = x.new_zeros(x.shape[0], B.shape[-1], x.shape[-1]) if state is None else at_least_float32(state)
    y = []
    for t in range(x.shape[1]):
        if resets is not None and t % chunk_size == 0:
            h = h.masked_fill(resets[:, t // chunk_size, None, None], 0)
        before = h
        output, h = s6_step(x[:, t], dt[:, t], A_log, B[:, t], C[:, t], state=h)
        y.append(torch.einsum("bn,bnd->bd", C[:, t], before) if exclusive else output)
    return torch.stack(y, 1), h


@exact
def s6_step(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x and dt [batch, channels], B and C [batch, state_size]."""
    x, dt, B, C = map(at_least_float32, (x, dt, B, C))
    decay = torch.exp(-dt[:, None] * at_least_float32(A_log).exp().T)
    state = state * decay + B[..., None] * (x * dt)[:, None]
    return (C[:, None] @ state).squeeze(1), state


@exact
def s6_chunked(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step at a time in all chunks at once, then a recurrence over chunks. No matmul does it, as no two states
    share a decay; memory linear in time, state_size times that of x."""
    x, dt, A_log, B, C = map(at_least_float32, (x, dt, A_log, B, C))
    batch, time, channels = x.shape
    rate = -A_log.exp().T  # [state, channels]
    x, dt, B, C = (z.unflatten(1, (time // chunk_size, chunk_size)) for z in (x, dt, B, C))
    decay = (dt[..., None, :] * rate).exp()  # [batch, chunks, chunk, state, channels]
    written = B[..., None] * (x * dt)[..., None, :]
    h, inner = torch.zeros_like(written[:, :, 0]), []
    for keep, write in zip(decay.unbind(2), written.unbind(2), strict=True):
        h = h * keep + write
        inner.append(h)
    carried = (dt.cumsum(2)[..., None, :] * rate).exp()  # what is left of the chunk's start

    h = x.new_zeros(batch, B.shape[-1], channels) if state is None else at_least_float32(state)
    if resets is not None:
        keep_in = (~resets).to(x.dtype)[..., None, None]
    starts = []
    for c, (write, keep) in enumerate(zip(inner[-1].unbind(1), carried[:, :, -1].unbind(1), strict=True)):
        if resets is not None:
            h = h * keep_in[:, c]
        starts.append(h)
        h = h * keep + write
    start = torch.stack(starts, 1)[:, :, None]
    states = torch.stack(inner, 2) + carried * start
    if exclusive:
        states = torch.cat((start, states[:, :, :-1]), 2)
    return (C[..., None, :] @ states).reshape(batch, time, channels), h


s6_decode = dispatched(  # `state` is given up
    chunked=s6_step, naive=s6_step, fused={"cpu": "bmojo.ops.step_cpu:s6_decode"}
)
s6 = dispatched(
    chunked=s6_chunked,
    naive=s6_naive,
    fused={"cpu": "bmojo.ops.s6_cpu:s6", "cuda": "bmojo.ops.triton_s6:s6"},
)
