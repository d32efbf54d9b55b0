"""`bmojo.memory.read` on CPUs in C++ (ops/attention_cpu.cpp): every block of 16 queries against the keys that it sees,
where they lie. Importing this module compiles it once; ImportError says why that can't be done here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bmojo.memory.layout import Layout
from bmojo.memory.read import Slots, Source, key_spans, read_chunked
from bmojo.ops.native import differentiable_once, load_ops

load_ops("attention_cpu.cpp")


def read(
    q: Tensor, sources: Sequence[Source], slots: Slots | None, layout: Layout, *, usage: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `bmojo.memory.read`. What is not float32 or float64 takes the chunked form, autocast too."""
    parts: list[Source | Slots] = [*sources] if slots is None else [*sources, slots]
    tensors = [q, *(z for part in parts for z in (part.k, part.v))]
    autocast = torch.is_autocast_enabled("cpu")
    if autocast or len({z.dtype for z in tensors}) > 1 or q.dtype not in (torch.float32, torch.float64):
        return read_chunked(q, sources, slots, layout, usage=usage)
    spans = [layout.once(("spans", *s.geometry), partial(key_spans, layout, *s.geometry)) for s in sources]
    geometry = [n for source in sources for n in source.geometry]
    if slots is not None:
        spans.append((slots.first.flatten(1), slots.last.flatten(1)))
        geometry += [slots.first.shape[2], 0, 0, 0]
    first, last = ([z.contiguous() for z in part] for part in zip(*spans, strict=True))
    k, v = ([getattr(part, name).flatten(1, -3).contiguous() for part in parts] for name in "kv")
    usage = usage and slots is not None
    o, _, used = torch.ops.bmojo.read_forward(q.contiguous(), k, v, first, last, geometry, layout.chunk, usage)
    return o, used.detach().view(slots.first.shape) if usage and slots is not None else None


@torch.library.register_fake("bmojo::read_forward")
def _(q, k, v, first, last, geometry, chunk_size, usage):
    used = k[-1].shape[1] if usage else 0
    return q.new_empty(*q.shape[:3], v[0].shape[-1]), q.new_empty(q.shape[:3]), q.new_empty(q.shape[0], used)


@torch.library.register_fake("bmojo::read_backward")
def _(go, o, lse, q, k, v, first, last, geometry, chunk_size):
    return torch.empty_like(q), [torch.empty_like(z) for z in k], [torch.empty_like(z) for z in v]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, first, last, ctx.geometry, ctx.chunk_size, _ = inputs
    ctx.count = len(k)
    ctx.save_for_backward(q, *output[:2], *k, *v, *first, *last)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, go: Tensor | None, *_: None) -> tuple:
    q, o, lse, *rest = ctx.saved_tensors
    k, v, first, last = (rest[i : i + ctx.count] for i in range(0, len(rest), ctx.count))
    nothing = [None] * ctx.count
    if go is None:
        return None, nothing, nothing, nothing, nothing, None, None, None
    dq, dk, dv = torch.ops.bmojo.read_backward(
        go.contiguous(), o, lse, q, k, v, first, last, ctx.geometry, ctx.chunk_size
    )
    return dq, dk, dv, nothing, nothing, None, None, None


differentiable_once("read_backward")
torch.library.register_autograd("bmojo::read_forward", _backward, setup_context=_save)
