"""`s6` as Triton kernels: a program goes through the time of a few channels of a row, SPAN steps at once by a parallel
scan in registers. The state at the start of every span is kept; the backward pass computes the states between again.
Definition and arguments: `bmojo.ops.s6`.

Shape suffixes: T the steps of a span, N states, D channels of the program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bmojo.ops.numerics import exact
from bmojo.ops.s6 import s6_chunked

SPAN = 16
FORWARD, BACKWARD = 256, 128  # states times channels of a program: what 4 warps have registers for
LARGEST = 64  # states


@triton.jit
def _then(decay, h, later_decay, later_h):
    return decay * later_decay, h * later_decay + later_h


@triton.jit
def _forward(
    x, dt, rate, B, C, state, fresh, y, starts, final, time, channels, states, chunk_size,
    SPAN: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, n = tl.arange(0, SPAN), tl.arange(0, N)
    d = tl.program_id(1) * D + tl.arange(0, D)
    known_n, known_d = n < states, d < channels
    place = n[:, None] * channels + d[None, :]
    known = known_n[:, None] & known_d[None, :]
    rate_ND = tl.load(rate + place, mask=known, other=0.0)
    h_ND = tl.load(state + row * states * channels + place, mask=known, other=0.0)
    for start in range(0, time, SPAN):
        if start % chunk_size == 0:
            h_ND *= 1.0 - tl.load(fresh + row * (time // chunk_size) + start // chunk_size)
        span = row * (time // SPAN) + start // SPAN
        tl.store(starts + span * states * channels + place, h_ND, mask=known)
        step = row * time + start + t
        wide = step[:, None] * channels + d[None, :]
        narrow = step[:, None] * states + n[None, :]
        dt_TD = tl.load(dt + wide, mask=known_d[None, :], other=0.0).to(tl.float32)
        x_TD = tl.load(x + wide, mask=known_d[None, :], other=0.0).to(tl.float32)
        B_TN = tl.load(B + narrow, mask=known_n[None, :], other=0.0).to(tl.float32)
        C_TN = tl.load(C + narrow, mask=known_n[None, :], other=0.0).to(tl.float32)
        decay = tl.exp(dt_TD[:, None, :] * rate_ND[None, :, :])
        left, h = tl.associative_scan((decay, B_TN[:, :, None] * (dt_TD * x_TD)[:, None, :]), 0, _then)
        h += left * h_ND[None, :, :]
        tl.store(y + wide, tl.sum(C_TN[:, :, None] * h, 1), mask=known_d[None, :])
        h_ND = tl.sum(tl.where((t == SPAN - 1)[:, None, None], h, 0.0), 0)
    tl.store(final + row * states * channels + place, h_ND, mask=known)


@triton.jit
def _backward(
    x, dt, rate, B, C, fresh, starts, dy, dfinal, dx, ddt, drate, dB, dC, dstate,
    time, channels, states, chunk_size, SPAN: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """drate of each row, and dB and dC of each block of channels: who calls sums them."""
    row = tl.program_id(0).to(tl.int64)
    t, n = tl.arange(0, SPAN), tl.arange(0, N)
    d = tl.program_id(1) * D + tl.arange(0, D)
    known_n, known_d = n < states, d < channels
    place = n[:, None] * channels + d[None, :]
    known = known_n[:, None] & known_d[None, :]
    rate_ND = tl.load(rate + place, mask=known, other=0.0)
    g_ND = tl.load(dfinal + row * states * channels + place, mask=known, other=0.0)  # of the state after the span
    drate_ND = tl.zeros([N, D], dtype=tl.float32)
    block = (tl.program_id(1) * tl.num_programs(0) + row) * time
    for back in range(0, time, SPAN):
        start = time - SPAN - back
        span = row * (time // SPAN) + start // SPAN
        start_ND = tl.load(starts + span * states * channels + place, mask=known, other=0.0)
        step = row * time + start + t
        wide = step[:, None] * channels + d[None, :]
        narrow = step[:, None] * states + n[None, :]
        dt_TD = tl.load(dt + wide, mask=known_d[None, :], other=0.0).to(tl.float32)
        x_TD = tl.load(x + wide, mask=known_d[None, :], other=0.0).to(tl.float32)
        dy_TD = tl.load(dy + wide, mask=known_d[None, :], other=0.0).to(tl.float32)
        B_TN = tl.load(B + narrow, mask=known_n[None, :], other=0.0).to(tl.float32)
        C_TN = tl.load(C + narrow, mask=known_n[None, :], other=0.0).to(tl.float32)
        decay = tl.exp(dt_TD[:, None, :] * rate_ND[None, :, :])
        write = B_TN[:, :, None] * (dt_TD * x_TD)[:, None, :]
        # the state before each step: the scan of the steps before
        first = (t > 0)[:, None]
        dt_before = tl.load(dt + wide - channels, mask=first & known_d[None, :], other=0.0).to(tl.float32)
        x_before = tl.load(x + wide - channels, mask=first & known_d[None, :], other=0.0).to(tl.float32)
        B_before = tl.load(B + narrow - states, mask=first & known_n[None, :], other=0.0).to(tl.float32)
        decay_before = tl.exp(dt_before[:, None, :] * rate_ND[None, :, :])
        write_before = B_before[:, :, None] * (dt_before * x_before)[:, None, :]
        left, before = tl.associative_scan((decay_before, write_before), 0, _then)
        before += left * start_ND[None, :, :]
        # the gradient of the state after each step: the scan of the steps after, backwards
        last = (t < SPAN - 1)[:, None]
        dt_after = tl.load(dt + wide + channels, mask=last & known_d[None, :], other=0.0).to(tl.float32)
        decay_after = tl.exp(dt_after[:, None, :] * rate_ND[None, :, :])
        left, g = tl.associative_scan((decay_after, C_TN[:, :, None] * dy_TD[:, None, :]), 0, _then, reverse=True)
        g += left * g_ND[None, :, :]
        tl.store(dC + block * states + (start + t)[:, None] * states + n[None, :],
                 tl.sum(dy_TD[:, None, :] * (decay * before + write), 2), mask=known_n[None, :])  # fmt: skip
        tl.store(dB + block * states + (start + t)[:, None] * states + n[None, :],
                 tl.sum(g * (dt_TD * x_TD)[:, None, :], 2), mask=known_n[None, :])  # fmt: skip
        through_write = tl.sum(g * B_TN[:, :, None], 1)
        through_decay = g * before * decay
        drate_ND += tl.sum(through_decay * dt_TD[:, None, :], 0)
        tl.store(dx + wide, dt_TD * through_write, mask=known_d[None, :])
        tl.store(
            ddt + wide, x_TD * through_write + tl.sum(through_decay * rate_ND[None, :, :], 1), mask=known_d[None, :]
        )
        g_ND = tl.sum(tl.where((t == 0)[:, None, None], decay * g, 0.0), 0)
        if start % chunk_size == 0:
            g_ND *= 1.0 - tl.load(fresh + row * (time // chunk_size) + start // chunk_size)
    tl.store(dstate + row * states * channels + place, g_ND, mask=known)
    tl.store(drate + row * states * channels + place, drate_ND, mask=known)


class _Scan(torch.autograd.Function):
    """Rows [batch, time, ...] of x, dt, B, C; rate [states, channels], -exp(A_log)^T; the rest in float32."""

    @staticmethod
    def forward(ctx, x, dt, rate, B, C, state, fresh, chunk_size):
        batch, time, channels = x.shape
        states = rate.shape[0]
        y, final = torch.empty_like(x, dtype=torch.float32), torch.empty_like(state)
        starts = state.new_empty(batch, time // SPAN, states, channels)
        grid, sizes = _grid(batch, channels, states, FORWARD)
        _forward[grid](x, dt, rate, B, C, state, fresh, y, starts, final, time, channels, states, chunk_size, **sizes)
        ctx.save_for_backward(x, dt, rate, B, C, fresh, starts)
        ctx.chunk_size = chunk_size
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, rate, B, C, fresh, starts = ctx.saved_tensors
        batch, time, channels = x.shape
        states = rate.shape[0]
        grid, sizes = _grid(batch, channels, states, BACKWARD)
        dx, ddt = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
        drate, dstate = (rate.new_empty(batch, *rate.shape) for _ in range(2))
        dB, dC = (rate.new_empty(grid[1], batch, time, states) for _ in range(2))
        _backward[grid](
            x, dt, rate, B, C, fresh, starts, dy.contiguous(), dfinal.contiguous(), dx, ddt, drate, dB, dC, dstate,
            time, channels, states, ctx.chunk_size, **sizes,
        )  # fmt: skip
        gradients = dx, ddt, drate.sum(0), dB.sum(0), dC.sum(0), dstate
        inputs = x, dt, rate, B, C, dstate
        return *(g.to(z.dtype) for g, z in zip(gradients, inputs, strict=True)), None, None


def _grid(batch: int, channels: int, states: int, tile: int) -> tuple[tuple[int, int], dict[str, Any]]:
    N = triton.next_power_of_2(states)
    D = max(1, tile // N)
    return (batch, triton.cdiv(channels, D)), {"SPAN": SPAN, "N": N, "D": D, "num_warps": 4}


@exact
def s6(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `bmojo.ops.s6`. float64, reading before writing, chunks that are not of whole spans of 16 steps, and more
    than 64 states take the chunked form."""
    batch, time, channels = x.shape
    states = B.shape[-1]
    if x.dtype == torch.float64 or exclusive or chunk_size % SPAN or states > LARGEST:
        options: dict[str, Any] = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
        return s6_chunked(x, dt, A_log, B, C, **options)
    rate = -A_log.float().exp().T.contiguous()
    if state is None:
        state = rate.new_zeros(batch, states, channels)
    fresh = rate.new_zeros(batch, time // chunk_size) if resets is None else resets.float().contiguous()
    rows = x.contiguous(), dt.contiguous(), rate, B.contiguous(), C.contiguous()
    return _Scan.apply(*rows, state.float().contiguous(), fresh, chunk_size)
