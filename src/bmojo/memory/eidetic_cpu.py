"""`bmojo.memory.eidetic.select` on CPUs in C++ (ops/eidetic_cpu.cpp): the same sets in the same order.
Importing this module compiles it once; ImportError says why that can't be done here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmojo.memory.eidetic import rank
from bmojo.memory.layout import Layout
from bmojo.ops.native import load_ops

load_ops("eidetic_cpu.cpp")


@torch.no_grad()
def select(
    score: Tensor, layout: Layout, slots: int, *, decay: float, threshold: float,
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """As `bmojo.memory.eidetic.select`."""
    if held is None:
        none = score.new_zeros(score.shape[0], slots)
        best, where = none, torch.full_like(none, -1, dtype=torch.int64)
    else:
        best, where = held
    score, position = torch.cat((best, score), 1), torch.cat((where, layout.position), 1)
    value = rank(score, position, position[:, 0], decay=1.0, threshold=threshold)
    complete, resets = layout.complete.contiguous(), layout.resets
    entries, positions = torch.ops.bmojo.select(
        value, position, complete, resets, slots, layout.chunk, -math.log(decay)
    )
    best = score.gather(1, entries[:, -1])
    if held is None:
        entries = torch.where(entries < slots, entries.clamp(max=layout.slots - 1), entries - slots)
    return entries[:, :-1], positions[:, :-1], (best, positions[:, -1], entries[:, -1])


@torch.library.register_fake("bmojo::select")
def _(value, position, complete, resets, slots, chunk_size, rate):
    sets = position.new_empty(value.shape[0], complete.shape[1] + 1, slots)
    return sets, torch.empty_like(sets)
