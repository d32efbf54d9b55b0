"""Selective scan of Mamba-2 (state-space duality).

    h_t = exp(-dt_t * exp(A_log)) * h_{t-1} + dt_t * B_t x_t^T,    y_t = C_t^T h_t

Shapes: x [batch, time, heads, head_dim]; dt [batch, time, heads], after softplus, 0 for a padded step;
A_log [heads]; B, C [batch, time, groups, state_size]; state [batch, heads, state_size, head_dim] or None for zeros;
resets [batch, time / chunk_size] bool or None: True where a chunk starts a new document, with an empty state.
`exclusive=True` reads before it writes, y_t = C_t^T h_{t-1}: what the past predicts.
Returns y like x, and the final state; both float32 (float64 if x is).
Source: Dao and Gu 2024, arXiv 2405.21060, section 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32, exact, repeat_groups, widest


@exact
def ssd_naive(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one step at a time."""
    x, dt, A_log, B, C = map(at_least_float32, (x, dt, A_log, B, C))
    heads, head_dim = x.shape[-2:]
    h = x.new_zeros(x.shape[0], heads, B.shape[-1], head_dim) if state is None else at_least_float32(state)
    y = []
    for t in range(x.shape[1]):
        if resets is not None and t % chunk_size == 0:
            h = h.masked_fill(resets[:, t // chunk_size, None, None, None], 0)
        before = h
        output, h = ssd_step(x[:, t], dt[:, t], A_log, B[:, t], C[:, t], state=h)
        if exclusive:
            output = torch.einsum("bhn,bhnp->bhp", repeat_groups(C[:, t], heads), before)
        y.append(output)
    return torch.stack(y, 1), h


@exact
def ssd_step(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x [batch, heads, head_dim], dt [batch, heads], B and C [batch, groups, state_size]."""
    x, dt, B, C = map(at_least_float32, (x, dt, B, C))
    heads = x.shape[1]
    B, C = repeat_groups(B, heads), repeat_groups(C, heads)
    decay = torch.exp(-dt * at_least_float32(A_log).exp())
    state = state * decay[..., None, None] + B[..., None] * (x * dt[..., None])[..., None, :]
    return (C[..., None, :] @ state).squeeze(-2), state


@exact
def ssd_chunked(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Matmuls inside a chunk, a recurrence over chunks. Cost O(time * chunk_size * head_dim); memory linear in time."""
    x, dt, A_log, B, C = map(at_least_float32, (x, dt, A_log, B, C))
    batch, time, heads, head_dim = x.shape
    groups, size, chunks = B.shape[2], B.shape[3], time // chunk_size

    def fold(z: Tensor) -> Tensor:  # [batch, time, n, size] -> [batch, chunks, n, chunk, size]
        return z.view(batch, chunks, chunk_size, *z.shape[2:]).transpose(2, 3)

    step = fold(-dt[..., None] * A_log.exp()[:, None]).squeeze(-1)  # log decay of each step, <= 0
    total = widest(step).cumsum(-1)  # [batch, chunks, heads, chunk]; its differences are taken in float64
    read = total - step if exclusive else total
    B, C = fold(B), fold(C)
    x = fold(x * dt[..., None])

    seen = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril(-1 if exclusive else 0)
    decay = (read[..., :, None] - total[..., None, :]).to(x.dtype).masked_fill(~seen, -torch.inf).exp()
    weights = (C @ B.mT).repeat_interleave(heads // groups, 2) * decay if groups > 1 else (C @ B.mT) * decay
    y = weights @ x

    B = B.expand(-1, -1, heads, -1, -1) if groups == 1 else B.repeat_interleave(heads // groups, 2)
    C = C.expand(-1, -1, heads, -1, -1) if groups == 1 else C.repeat_interleave(heads // groups, 2)
    written = (
        B * (total[..., -1:] - total).to(x.dtype).exp()[..., None]
    ).mT @ x  # [batch, chunks, heads, state, head_dim]
    kept = total[..., -1].to(x.dtype).exp()
    if resets is not None:
        keep_in = (~resets).to(x.dtype)[..., None, None, None]
    h = x.new_zeros(batch, heads, size, head_dim) if state is None else at_least_float32(state)
    starts = []
    for c, (write, keep) in enumerate(zip(written.unbind(1), kept.unbind(1), strict=True)):
        if resets is not None:
            h = h * keep_in[:, c]
        starts.append(h)
        h = h * keep[..., None, None] + write
    y = y + (C * read.to(x.dtype).exp()[..., None]) @ torch.stack(starts, 1)
    return y.transpose(2, 3).reshape(batch, time, heads, head_dim), h


ssd_decode = dispatched(
    chunked=ssd_step, naive=ssd_step, fused={"cpu": "bmojo.ops.step_cpu:ssd_decode"}
)  # `state` is given up
ssd = dispatched(
    chunked=ssd_chunked,
    naive=ssd_naive,
    fused={"cpu": "bmojo.ops.ssd_cpu:ssd", "cuda": "bmojo.ops.fla:ssd"},
)
