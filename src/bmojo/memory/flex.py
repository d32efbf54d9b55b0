"""`bmojo.memory.read` through FlexAttention: one kernel, one softmax, no copy of the window for every chunk.

Keys are [window | fading | slots of all chunks], each part padded to whole blocks. Which blocks of keys a block of
queries meets follows from the spans of the keys, without asking the host; it is the same in every layer, so a layout
keeps it. The table of blocks has (L / 128) * (keys / 128) entries: negligible up to a few 100 000 tokens a call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from bmojo.memory.layout import Layout
from bmojo.memory.read import Slots, Source, key_spans, read_chunked, slot_usage

BLOCK = 128  # of queries and of keys
NEVER = 2**31 - 1  # the first slot that sees a key that none sees
Spans = tuple[Tensor, Tensor]  # first and last query slot that see each key


def _attention() -> Callable:
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


@functools.cache
def _compiled() -> Callable:
    """One compilation for every kind of call, at most two more for lengths; never the form that holds all scores."""
    return torch.compile(flex_attention, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]


def read_flex(
    q: Tensor, sources: Sequence[Source], slots: Slots | None, layout: Layout, *, usage: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `bmojo.memory.read`. float64 and heads smaller than 16, which have no such kernel, take the chunked form."""
    if q.dtype == torch.float64 or sources[0].v.shape[-1] < 16:
        return read_chunked(q, sources, slots, layout, usage=usage)
    return run(_attention(), q, sources, slots, layout, usage, {"BACKEND": "TRITON"})


def run(
    attention: Callable, q: Tensor, sources: Sequence[Source], slots: Slots | None, layout: Layout, usage: bool,
    kernel_options: dict | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    parts: list[Source | Slots] = [*sources] if slots is None else [*sources, slots]
    k, v = (torch.cat([_padded(getattr(part, name)) for part in parts], 1).to(dtype) for name in "kv")
    q = q.transpose(1, 2).to(dtype)
    usage = usage and slots is not None
    out = attention(
        q,
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=block_mask(sources, slots, layout),
        enable_gqa=q.shape[1] != k.shape[2],
        kernel_options=kernel_options,
        return_aux=AuxRequest(lse=True) if usage else None,
    )
    if not usage:
        return out.transpose(1, 2), None
    assert slots is not None
    o, aux = out
    return o.transpose(1, 2), slot_usage(q, slots, layout, aux.lse.detach())


def block_mask(sources: Sequence[Source], slots: Slots | None, layout: Layout) -> BlockMask:
    """The mask of all queries [L] and keys, with the table of the blocks that need looking at."""
    batch = layout.position.shape[0]
    spans = [layout.once(("whole spans", *s.geometry), partial(_source_spans, s, layout)) for s in sources]
    each = 0 if slots is None else slots.first.shape[2]
    name = ("blocks", *(s.geometry for s in sources), each)
    mask = copy.copy(layout.once(name, partial(_table, spans, each, layout)))
    if slots is not None:
        spans = [*spans, _whole_blocks(slots.first.flatten(1), slots.last.flatten(1))]
    first, last = (z.to(torch.int32) for z in _join(spans, batch))

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[b, key] <= query) & (query <= last[b, key])

    mask.mask_mod = seen
    return mask


def _table(spans: list[Spans], each: int, layout: Layout) -> BlockMask:
    """The table without its mask: a block of keys is met by the queries from its first to its last, and needs no mask
    where all its keys are seen by all. Slots, `each` a chunk, count as seen by their whole chunk, and as in need."""
    outer, inner = [*spans], [*spans]
    if each:
        chunk = torch.arange(0, layout.slots, layout.chunk, device=spans[0][0].device).repeat_interleave(each)[None]
        outer.append(_whole_blocks(chunk, chunk + layout.chunk - 1))
        inner.append((torch.full_like(outer[-1][0], NEVER), torch.full_like(outer[-1][1], -1)))
    rows = max(first.shape[0] for first, _ in spans)
    first, last = (z.unflatten(1, (-1, BLOCK)) for z in _join(outer, rows))
    all_first, all_last = (z.unflatten(1, (-1, BLOCK)) for z in _join(inner, rows))
    start = torch.arange(0, layout.slots, BLOCK, device=first.device)[:, None]
    end = start + BLOCK - 1
    met = (first.amin(-1)[:, None] <= end) & (start <= last.amax(-1)[:, None])  # [rows, query blocks, key blocks]
    whole = (all_first.amax(-1)[:, None] <= start) & (end <= all_last.amin(-1)[:, None])
    sizes: dict[str, Any] = {"BLOCK_SIZE": BLOCK, "seq_lengths": (layout.slots, first.shape[1] * BLOCK)}
    return BlockMask.from_kv_blocks(*_listed(met & ~whole), *_listed(whole), **sizes)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of [rows, query blocks, key blocks] are True, and the indices, those first; one head stands for all."""
    blocks = blocks[:, None].to(torch.int32)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _padded(rows: Tensor) -> Tensor:
    """[B, n, K, P], or the slots [B, N, E, K, P] of all chunks, with zeros up to whole blocks."""
    rows = rows.flatten(1, -3)
    return F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % BLOCK))


def _source_spans(source: Source, layout: Layout) -> Spans:
    return _whole_blocks(*key_spans(layout, *source.geometry))


def _whole_blocks(first: Tensor, last: Tensor) -> Spans:
    """Spans [rows, n] with those of keys that no query sees, (NEVER, -1), up to whole blocks."""
    none = last < first.clamp(min=0)
    extra = (0, -first.shape[1] % BLOCK)
    return F.pad(first.masked_fill(none, NEVER), extra, value=NEVER), F.pad(last.masked_fill(none, -1), extra, value=-1)


def _join(spans: list[Spans], rows: int) -> Spans:
    first, last = (torch.cat([z.expand(rows, -1) for z in part], 1) for part in zip(*spans, strict=True))
    return first, last
