"""`rls` as Triton kernels: of each chunk, the precision M of its start is inverted once, in registers, and every token
is then one rank-one step,

    u = P k,    leverage = k . u,    score = leverage / (1 + leverage),    P <- P - u u^T / (1 + leverage),

all chunks at once. That M^-1 is at most 1 / RLS_RIDGE keeps the subtractions harmless in float32. There is no gradient,
as scores have none. Definition and arguments: `bmojo.ops.innovation`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bmojo.ops import innovation
from bmojo.ops.numerics import exact

LARGEST = 128  # dimensions that fit the registers


@triton.jit
def _starts(
    within, plain, shrink, fresh, complete, A_in, M_in, starts, A_out, M_out,
    chunks, dim, forgetting, ridge, condition, SIZE: tl.constexpr,
):  # fmt: skip
    """M at the start of every chunk of a row [chunks, dim, dim], and A and M at its end, chunk after chunk."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    diagonal = lane[:, None] == lane[None, :]
    inside = (lane[:, None] < dim) & (lane[None, :] < dim)
    place = lane[:, None] * dim + lane[None, :]
    area = dim * dim
    A = tl.load(A_in + row * area + place, mask=inside, other=0.0)
    M = tl.load(M_in + row * area + place, mask=inside, other=0.0)
    for c in range(chunks):
        at = row * chunks + c
        empty = tl.load(fresh + at) != 0
        A = tl.where(empty, 0.0, A)
        M = tl.where(empty, tl.where(diagonal, ridge, 0.0), M)
        tl.store(starts + at * area + place, M, mask=inside)
        A = tl.load(shrink + at) * A + tl.load(within + at * area + place, mask=inside, other=0.0)
        rho = ridge + tl.sum(tl.sum(tl.where(diagonal, A, 0.0), 1), 0) / condition
        grown = M + tl.load(plain + at * area + place, mask=inside, other=0.0)
        M = tl.where(tl.load(complete + at) != 0, forgetting * A + tl.where(diagonal, rho, 0.0), grown)
    tl.store(A_out + row * area + place, A, mask=inside)
    tl.store(M_out + row * area + place, M, mask=inside)


@triton.jit
def _leverages(starts, keys, leverages, chunk, dim, SIZE: tl.constexpr):
    """k_t^T P k_t of the tokens of one chunk, keys [chunk, dim] (zero where there is none)."""
    at = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    row, column = lane[:, None], lane[None, :]
    inside = (row < dim) & (column < dim)
    P = tl.load(starts + at * dim * dim + row * dim + column, mask=inside, other=0.0)
    P = tl.where(inside, P, tl.where(row == column, 1.0, 0.0))
    for i in range(dim):  # sweep by sweep, M becomes -M^-1
        line = tl.sum(tl.where(column == i, P, 0.0), 1)
        pivot = tl.sum(tl.where(lane == i, line, 0.0), 0)
        line = tl.where(lane == i, -1.0, line)
        P = tl.where((row == i) | (column == i), 0.0, P) - line[:, None] * line[None, :] / pivot
    P = -P
    for t in range(chunk):
        k = tl.load(keys + (at * chunk + t) * dim + lane, mask=lane < dim, other=0.0)
        u = tl.sum(P * k[None, :], 1)
        leverage = tl.sum(k * u, 0)
        tl.store(leverages + at * chunk + t, leverage)
        P -= u[:, None] * u[None, :] / (1.0 + leverage)


@exact
@torch.no_grad()
def rls(
    k: Tensor, valid: Tensor, A: Tensor, M: Tensor, *, chunk_size: int, forgetting: float, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bmojo.ops.innovation.rls_chunked`; float64 and more than 128 dimensions take that form."""
    batch, time, dim = k.shape
    if torch.float64 in (k.dtype, A.dtype) or dim > LARGEST:
        return innovation.rls_chunked(k, valid, A, M, chunk_size=chunk_size, forgetting=forgetting, resets=resets)
    chunks = time // chunk_size
    alive = valid.view(batch, chunks, chunk_size)
    K = (k.float() * valid[..., None]).view(batch, chunks, chunk_size, dim)
    later = alive.flip(-1).cumsum(-1).flip(-1) - alive.long()  # tokens of the chunk that come after
    within = (K * (later * math.log(forgetting)).exp()[..., None]).mT @ K
    shrink = (alive.sum(-1) * math.log(forgetting)).exp()
    fresh = torch.zeros(batch, chunks, dtype=torch.bool, device=k.device) if resets is None else resets
    starts, share = torch.empty_like(within), torch.empty_like(K[..., 0])
    A_out, M_out = torch.empty_like(within[:, 0]), torch.empty_like(within[:, 0])
    flags = [z.to(torch.int32).contiguous() for z in (fresh, alive[..., -1])]
    size = _size(dim)
    _starts[(batch,)](
        within.contiguous(), (K.mT @ K).contiguous(), shrink, *flags, A.contiguous(), M.contiguous(),
        starts, A_out, M_out, chunks, dim, forgetting, innovation.RLS_RIDGE, innovation.RLS_CONDITION, **size,
    )  # fmt: skip
    _leverages[(batch * chunks,)](starts, K, share, chunk_size, dim, **size)
    return (share / (1 + share)).view(batch, time), A_out, M_out


def leverage(k: Tensor, M: Tensor) -> Tensor:
    """See `bmojo.ops.innovation.leverage_cholesky`. Unlike a factorisation, it can be part of a CUDA graph."""
    batch, dim = k.shape
    if torch.float64 in (k.dtype, M.dtype) or dim > LARGEST:
        return innovation.leverage_cholesky(k, M)
    share = k.new_empty(batch)
    _leverages[(batch,)](M.contiguous(), k.contiguous(), share, 1, dim, **_size(dim))
    return share


def _size(dim: int) -> dict[str, Any]:
    return {"SIZE": triton.next_power_of_2(dim), "num_warps": 8 if dim > 64 else 4}
