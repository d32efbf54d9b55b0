"""`ssd` and `gated_delta` through the Triton kernels of flash-linear-attention (extra `gpu`), which know

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t        and its gated delta rule.

Signatures and results are those of `bmojo.ops.ssd` and `bmojo.ops.gated_delta`. The kernels multiply in the half
precision of the inputs and carry float32 states. Wider inputs, whose digits they would not keep, and head or state
sizes that they are not made for take the chunked form.

A reset is a decay that leaves nothing; reading before writing is reading with the query of the token after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.simple_gla import chunk_simple_gla
from torch import Tensor

from bmojo.ops.gated_delta import gated_delta_chunked
from bmojo.ops.numerics import at_least_float32, exact, repeat_groups
from bmojo.ops.ssd import ssd_chunked

FORGET = -120.0  # e^-120 is 0 in float32; a cumulative sum that has it loses few digits
HALF = (torch.bfloat16, torch.float16)
LEAST, MOST = 16, 256  # sizes of heads and states


@exact
def ssd(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not _fits(x, B):
        options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
        return ssd_chunked(x, dt, A_log, B, C, **options)
    heads, dt = x.shape[2], at_least_float32(dt)
    k, q = (repeat_groups(z.to(x.dtype), heads) for z in (B, C))
    v = (x * dt[..., None]).to(x.dtype)
    g = -dt * at_least_float32(A_log).exp()
    return _scan(chunk_simple_gla, {"q": q, "k": k, "v": v, "g": g}, chunk_size, state, resets, exclusive)


@exact
def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not _fits(v, k):
        options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
        return gated_delta_chunked(q, k, v, beta, g, **options)
    rows = {"q": q.to(v.dtype), "k": k.to(v.dtype), "v": v, "g": at_least_float32(g), "beta": at_least_float32(beta)}
    return _scan(chunk_gated_delta_rule, rows, chunk_size, state, resets, exclusive)


def _fits(v: Tensor, k: Tensor) -> bool:
    return v.dtype in HALF and v.shape[-1] >= LEAST and LEAST <= k.shape[-1] <= MOST


def _scan(
    kernel: Callable, rows: dict[str, Tensor], chunk_size: int, state: Tensor | None, resets: Tensor | None,
    exclusive: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel on rows [batch, time, heads, ...], `state` in float32 as we keep it."""
    query, starts = rows["q"], None
    if resets is not None:
        starts = F.pad(resets[..., None], (0, chunk_size - 1)).flatten(1)[..., None]  # [batch, time, 1]
        rows["g"] = rows["g"].masked_fill(starts, FORGET)
    if exclusive:  # S_{t-1}^T q_t is what step t - 1 gives for the query q_t
        rows["q"] = F.pad(query[:, 1:], (0, 0, 0, 0, 0, 1))
    state = None if state is None else at_least_float32(state)
    o, final = kernel(**rows, scale=1.0, initial_state=state, output_final_state=True)
    o = at_least_float32(o)
    if exclusive:
        before = torch.zeros_like(o[:, :1])
        if state is not None:
            before = (at_least_float32(query[:, :1])[..., None, :] @ state[:, None]).squeeze(-2)
        o = torch.cat((before, o[:, :-1]), 1)
        if starts is not None:
            o = o.masked_fill(starts[..., None], 0)
    return o, final
