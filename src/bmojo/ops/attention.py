"""One softmax over a set of keys; an empty set gives zero. Shapes: q [batch, heads, queries, head_dim],
k, v [batch, kv_heads, keys, head_dim], mask bool (True: visible), broadcastable to [batch, heads, queries, keys]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32, exact, repeat_groups


def attend_naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """o_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j over the visible j, in the dtype given."""
    k, v = (repeat_groups(z.transpose(1, 2), q.shape[1]).transpose(1, 2) for z in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def attend_chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """The same through PyTorch's fused kernels."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


@exact
@torch.no_grad()
def largest_weights(q: Tensor, k: Tensor, mask: Tensor, count: int) -> Tensor:
    """The largest softmax weight that any head and query gives to each of the last `count` keys: [batch, count],
    float32 at least."""
    q, k = at_least_float32(q), at_least_float32(k)
    group, largest = q.shape[1] // k.shape[1], q.new_zeros(q.shape[0], count)
    for head in range(q.shape[1]):  # one at a time: a head's scores are as many as its queries times its keys
        scores = (q[:, head] @ k[:, head // group].mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, 0], -torch.inf)
        weights = (scores - scores.logsumexp(-1, keepdim=True))[..., -count:].exp()
        largest = torch.maximum(largest, weights.amax(1))
    return largest


def last_weights(q: Tensor, keys: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The softmax weights [batch, heads, n] of one query a head, q [batch, heads, head_dim], for the last of the sets
    of `keys` [batch, n, kv_heads, head_dim] with `masks` [batch, n]."""
    k = repeat_groups(torch.cat([z.to(q.dtype) for z in keys], 1), q.shape[1])
    scores = torch.einsum("bhd,bnhd->bhn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~torch.cat(list(masks), 1)[:, None], -torch.inf).softmax(-1)
    return weights[..., -keys[-1].shape[1] :]


# PyTorch's fused kernels are none of XLA's: it fuses what it is given
attend = dispatched(chunked=attend_chunked, naive=attend_naive, fused={"xla": "bmojo.ops.attention:attend_naive"})


def _put(rows: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """`rows` [batch, n, ...], written in place: entry `index` [batch] int64 becomes `value` [batch, ...]."""
    rows[torch.arange(rows.shape[0], device=rows.device), index] = value.to(rows.dtype)
    return rows


def _attend_rows(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """One query a head, q [batch, heads, head_dim], against sets of rows [batch, n, kv_heads, head_dim] with masks
    [batch, n], in one softmax."""
    k, v = (torch.cat([z.to(q.dtype) for z in part], 1).transpose(1, 2) for part in (keys, values))
    return attend(q[:, :, None], k, v, torch.cat(list(masks), -1)[:, None, None])[:, :, 0]


put = dispatched(chunked=_put, naive=_put, fused={"cpu": "bmojo.ops.step_cpu:put"})
attend_rows = dispatched(chunked=_attend_rows, naive=_attend_rows, fused={"cpu": "bmojo.ops.step_cpu:attend_rows"})
