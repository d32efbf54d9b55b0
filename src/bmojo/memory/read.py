"""What the queries of a call read: the window, the fading tokens, and what is each chunk's own, in ONE softmax.

Every key is seen by an interval of query slots: entry j of a `Source` by slots [j + nearest, j + nearest + span) of its
document, a slot of the eidetic set of chunk c by the tokens of chunk c that are `window` or more after it, a token from
storage by those of the stride that it was found for. `key_spans` and `slot_spans` give such intervals, which are all
that a mask needs.

q [B, L, H, P]; returns o [B, L, H, P of v], and, if `usage` is asked for, the largest weight that any query and head
gives to each slot [B, N, E], float32 at least, detached. What slots without a token give is finite and means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmojo.memory.layout import Layout, blocks
from bmojo.ops.attention import attend, attend_naive, largest_weights
from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32, exact


@dataclass(frozen=True)
class Source:
    """Keys and values [B, size + L / stride, K, P], as `Layout.history` lays them out, of positions in
    (i - nearest - span, i - nearest] for query i."""

    k: Tensor
    v: Tensor
    size: int
    stride: int
    nearest: int
    span: int

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        return self.size, self.stride, self.nearest, self.span


@dataclass(frozen=True)
class Slots:
    """Keys and values [B, N, E, K, P] that belong to a chunk each, and the first and last query slot [B, N, E] of the
    chunk that see them; last < first: none does. `token` [B, N, E], where it is known: which slot of all rows' [B * L]
    each is of."""

    k: Tensor
    v: Tensor
    first: Tensor
    last: Tensor
    token: Tensor | None = None

    def join(self, other: Slots) -> Slots:
        """These, then those, of every chunk."""
        return Slots(
            *(torch.cat((getattr(self, name), getattr(other, name)), 2) for name in ("k", "v", "first", "last"))
        )


def key_spans(layout: Layout, size: int, stride: int, nearest: int, span: int) -> tuple[Tensor, Tensor]:
    """First and last query slot [B or 1, size + L / stride] that see each entry; last < first: none does."""
    position, segment = layout.sources(size, stride)
    segments = layout.segment
    if layout.source is None and not layout.continued:
        position, segment, segments = position[:1], segment[:1], segments[:1]
    entry = torch.arange(-size, layout.slots // stride, device=position.device)
    first = (entry * stride + stride - 1 + nearest).expand_as(position)
    end = torch.searchsorted(segments.contiguous(), segment.contiguous(), right=True) * layout.chunk
    last = torch.minimum(first + span, end) - 1
    known = (segment >= 0) & (position >= 0)
    return first, last.masked_fill(~known, -size * stride - 1)


def slot_spans(position: Tensor, layout: Layout, nearest: int) -> tuple[Tensor, Tensor]:
    """First and last query slot [B, N, E] that see the eidetic slots at `position` [B, N, E]; padding sees none."""

    def chunks() -> tuple[Tensor, Tensor, Tensor]:
        start = layout.position[:, :: layout.chunk]
        begin = torch.arange(0, layout.slots, layout.chunk, device=position.device).expand_as(start)
        count = layout.valid.unflatten(1, (layout.chunks, layout.chunk)).sum(2)
        begin, taken = torch.cat((layout.offset[:, None], begin[:, 1:]), 1), begin
        return tuple(z[..., None] for z in (begin, begin + count - 1, taken - start + nearest))  # type: ignore

    begin, last, ahead = layout.once(("chunks", nearest), chunks)
    return torch.maximum(ahead + position, begin), last.expand_as(position).masked_fill(position < 0, -1)


def read_chunked(
    q: Tensor, sources: Sequence[Source], slots: Slots | None, layout: Layout, *, usage: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Every chunk of queries against dense blocks [window | fading | slots], as one batch."""
    batch, chunks, chunk = q.shape[0], layout.chunks, layout.chunk
    keys, values, masks = [], [], []
    for source in sources:
        skip = source.nearest // source.stride
        back = skip + source.span // source.stride
        keys.append(blocks(source.k, chunks, chunk // source.stride, back, skip))
        values.append(blocks(source.v, chunks, chunk // source.stride, back, skip))
        masks.append(layout.reachable(*source.geometry))
    if slots is not None:
        keys.append(slots.k)
        values.append(slots.v)
        masks.append(_slot_mask(slots, layout))
    mask = torch.cat([m.expand(batch, -1, -1, -1) for m in masks], -1).flatten(0, 1)[:, None]
    q = q.unflatten(1, (chunks, chunk)).flatten(0, 1).transpose(1, 2)
    k, v = (torch.cat([z.transpose(2, 3) for z in part], 3).flatten(0, 1) for part in (keys, values))
    used = None
    if usage and slots is not None:
        used = largest_weights(q, k, mask, slots.k.shape[2]).unflatten(0, (batch, chunks))
    return attend(q, k, v, mask).transpose(1, 2).unflatten(0, (batch, chunks)).flatten(1, 2), used


def read_naive(
    q: Tensor, sources: Sequence[Source], slots: Slots | None, layout: Layout, *, usage: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The definition: all queries against all keys of the call, masked."""
    parts = [(s.k, s.v, *key_spans(layout, *s.geometry)) for s in sources]
    if slots is not None:
        parts.append(tuple(z.flatten(1, 2) for z in (slots.k, slots.v, slots.first, slots.last)))  # type: ignore
    k, v, first, last = (
        torch.cat([z.expand(q.shape[0], *z.shape[1:]) for z in part], 1) for part in zip(*parts, strict=True)
    )
    query = torch.arange(layout.slots, device=q.device)[:, None]
    mask = ((first[:, None] <= query) & (query <= last[:, None]))[:, None]
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    used = None
    if usage and slots is not None:
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
        used = slot_usage(q, slots, layout, scores.masked_fill(~mask, -torch.inf).logsumexp(-1))
    return attend_naive(q, k, v, mask).transpose(1, 2), used


@exact
@torch.no_grad()
def slot_usage(q: Tensor, slots: Slots, layout: Layout, lse: Tensor) -> Tensor:
    """The largest weight of each slot [B, N, E], given the log-sum-exp [B, H, L] of all scores of q [B, H, L, P]."""
    mask = _slot_mask(slots, layout)
    q, lse = (z.unflatten(2, (layout.chunks, layout.chunk)) for z in (at_least_float32(q), lse))
    k = at_least_float32(slots.k)
    group, largest = q.shape[1] // k.shape[3], q.new_zeros(slots.first.shape)
    for head in range(q.shape[1]):  # one at a time, for the memory of the scores
        scores = q[:, head] @ k[:, :, :, head // group].mT * q.shape[-1] ** -0.5 - lse[:, head, ..., None]
        largest = torch.maximum(largest, scores.masked_fill(~mask, -torch.inf).exp().amax(2))
    return largest


def _slot_mask(slots: Slots, layout: Layout) -> Tensor:
    """[B, N, chunk, E]: the query sees the slot."""
    query = torch.arange(layout.slots, device=slots.k.device).view(layout.chunks, layout.chunk, 1)
    return (slots.first[:, :, None] <= query) & (query <= slots.last[:, :, None])


read = dispatched(
    chunked=read_chunked,
    naive=read_naive,
    fused={"cpu": "bmojo.memory.read_cpu:read", "cuda": "bmojo.memory.flex:read_flex"},
)
