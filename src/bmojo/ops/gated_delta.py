"""Gated delta rule: a key-value matrix that decays, and corrects what it holds under a key.

    S_t = a_t S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - a_t S_{t-1}^T k_t),   o_t = S_t^T q_t,   a_t = exp(g_t)

Shapes: q, k [batch, time, heads, state_size], k of unit norm; v [batch, time, heads, head_dim];
beta, g [batch, time, heads], both 0 for a padded step; state [batch, heads, state_size, head_dim] or None for zeros;
resets [batch, time / chunk_size] bool or None: True where a chunk starts a new document, with an empty state.
`exclusive=True` reads before it decays and writes, o_t = S_{t-1}^T q_t: what the past predicts.
Returns o like v, and the final state; both float32 (float64 if v is).
Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32, exact, widest


def substitute(system: Tensor, right: Tensor) -> Tensor:
    """x with system @ x = right [..., n, m]; system [..., n, n] lower triangular, ones on its diagonal."""
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


solve_unit_lower = dispatched(chunked=substitute, naive=substitute, fused={"xla": "bmojo.ops.xla:solve_unit_lower"})


@exact
def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the arguments of the definition without their time dimension."""
    q, k, v, beta, g = map(at_least_float32, (q, k, v, beta, g))
    state = state * g.exp()[..., None, None]
    error = (v - (k[..., None, :] @ state).squeeze(-2)) * beta[..., None]
    state = state + k[..., None] * error[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


@exact
def gated_delta_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one step at a time."""
    q, k, v, beta, g = map(at_least_float32, (q, k, v, beta, g))
    S = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if state is None else at_least_float32(state)
    outputs = []
    for t in range(v.shape[1]):
        if resets is not None and t % chunk_size == 0:
            S = S.masked_fill(resets[:, t // chunk_size, None, None, None], 0)
        before = S
        output, S = gated_delta_step(q[:, t], k[:, t], v[:, t], beta[:, t], g[:, t], state=S)
        outputs.append((q[:, t, :, None, :] @ before).squeeze(-2) if exclusive else output)
    return torch.stack(outputs, 1), S


@exact
def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Inside a chunk the corrections u solve one unit lower-triangular system; a recurrence runs over chunks."""
    q, k, v, beta, g = map(at_least_float32, (q, k, v, beta, g))
    batch, time, heads, head_dim = v.shape
    chunks = time // chunk_size

    def fold(z: Tensor) -> Tensor:  # [batch, time, heads, size] -> [batch, chunks, heads, chunk, size]
        return z.view(batch, chunks, chunk_size, heads, -1).transpose(2, 3)

    q, k, v, beta, g = fold(q), fold(k), fold(v), fold(beta[..., None]), fold(g[..., None])
    total = widest(g).cumsum(-2)  # [batch, chunks, heads, chunk, 1]: log decay since the chunk's start
    read = total - g if exclusive else total
    ones = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=v.device)
    earlier = (total - total.mT).to(v.dtype).masked_fill(~ones.tril(-1), -torch.inf).exp()
    system = torch.eye(chunk_size, dtype=v.dtype, device=v.device) + beta * (k @ k.mT) * earlier
    right = torch.cat((beta * v, beta * k * total.to(v.dtype).exp()), -1)
    from_values, from_state = solve_unit_lower(system, right).split((head_dim, k.shape[-1]), -1)
    seen = (read - total.mT).to(v.dtype).masked_fill(~ones.tril(-1 if exclusive else 0), -torch.inf).exp()
    weights = (q @ k.mT) * seen
    q = q * read.to(v.dtype).exp()
    k = (k * (total[..., -1:, :] - total).to(v.dtype).exp()).mT
    kept = total[..., -1, :].to(v.dtype).exp()[..., None]
    S = v.new_zeros(batch, heads, k.shape[-2], head_dim) if state is None else at_least_float32(state)
    outputs = []
    per_chunk = (z.unbind(1) for z in (from_values, from_state, weights, q, k, kept))
    for c, (u, w, attend, query, key, keep) in enumerate(zip(*per_chunk, strict=True)):
        if resets is not None:
            S = S.masked_fill(resets[:, c, None, None, None], 0)
        u = u - w @ S
        outputs.append(query @ S + attend @ u)
        S = S * keep + key @ u
    return torch.stack(outputs, 1).transpose(2, 3).reshape(batch, time, heads, head_dim), S


gated_delta_decode = dispatched(  # `state` is given up
    chunked=gated_delta_step, naive=gated_delta_step, fused={"cpu": "bmojo.ops.step_cpu:gated_delta_decode"}
)
gated_delta = dispatched(
    chunked=gated_delta_chunked,
    naive=gated_delta_naive,
    fused={"cpu": "bmojo.ops.gated_delta_cpu:gated_delta", "cuda": "bmojo.ops.fla:gated_delta"},
)
