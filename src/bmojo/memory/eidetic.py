"""The eidetic set: the E positions of highest score among the past, kept by streaming top-E.

M_c holds the E tokens of highest `s_p * decay^age` among all p < c * chunk, ties to the newer. Keeping the best E of
(the old set and the chunk just completed) gives exactly the sets that ranking the whole past would give, because one
decay for all ages never changes the order of two tokens. So training in parallel and decoding token by token agree.

A set is three tensors [batch, slots]: score, position (-1: the slot is empty), and an index or the stored rows.
Nothing here is differentiable: gradients flow through the keys and values of the chosen tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmojo.memory.layout import Layout
from bmojo.ops.dispatch import dispatched


def rank(score: Tensor, position: Tensor, now: Tensor, *, decay: float, threshold: float) -> Tensor:
    """log(score * decay^age) of each candidate [batch, n]; -inf for an empty or inadmissible one. `now` [batch]."""
    value = score.clamp(min=torch.finfo(score.dtype).tiny).log()
    if decay < 1:
        value = value - (now[:, None] - position).to(score.dtype) * -math.log(decay)
    return value.masked_fill((position < 0) | (score < threshold), -torch.inf)


def sorted_first(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of value [batch, n] in descending order, ties to the first: values and indices."""
    value, order = torch.sort(value, dim=1, descending=True, stable=True)
    return value[:, :count], order[:, :count]


best_first = dispatched(chunked=sorted_first, naive=sorted_first, fused={"xla": "bmojo.ops.xla:best_first"})


def keep_best(
    score: Tensor, position: Tensor, now: Tensor, slots: int, *, decay: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Indices [batch, slots] of the best candidates, and whether each is one. Candidates [batch, n]: newest first."""
    value = rank(score, position, now, decay=decay, threshold=threshold)
    value, order = best_first(value, slots)
    return order, value > -torch.inf


def select_chunked(
    score: Tensor, layout: Layout, slots: int, *, decay: float, threshold: float,
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The eidetic set of every chunk.

    `score` [B, L] (slots of tokens that came before hold the scores they had); `held` = (score, position) [B, E] of the
    state's set. Returns index and position [B, N, E] of each chunk's set, and (score, position, index) of the set at
    the end of the call. An index counts the E held slots first (if `held` is given), then the L slots of the layout.
    """
    batch, first = score.shape[0], 0 if held is None else slots
    chunk, now = layout.chunk, layout.position
    if held is None:
        best = score.new_zeros(batch, slots)
        where = torch.full_like(best, -1, dtype=torch.int64)
    else:
        best, where = held
    index = torch.arange(slots, device=score.device).expand(batch, -1).clamp(max=first + layout.slots - 1)
    ends, complete, resets = now[:, chunk - 1 :: chunk] + 1, layout.complete, layout.resets
    sets, positions = [], []
    for c in range(layout.chunks):
        if resets is not None:
            where = where.masked_fill(resets[:, c, None], -1)
        sets.append(index)
        positions.append(where)
        part = slice(c * chunk, (c + 1) * chunk)
        new = torch.arange(first + part.start, first + part.stop, device=score.device).expand(batch, -1)
        pairs = ((score[:, part], best), (now[:, part], where), (new, index))
        candidates = [torch.cat((fresh.flip(1), old), 1) for fresh, old in pairs]
        order, is_one = keep_best(candidates[0], candidates[1], ends[:, c], slots, decay=decay, threshold=threshold)
        chosen = [x.gather(1, order) for x in candidates]
        chosen[1] = chosen[1].masked_fill(~is_one, -1)
        if not layout.whole:
            done = complete[:, c, None]
            chosen = [torch.where(done, x, old) for x, old in zip(chosen, (best, where, index), strict=True)]
        best, where, index = chosen
    return torch.stack(sets, 1), torch.stack(positions, 1), (best, where, index)


def select_naive(
    score: Tensor, layout: Layout, slots: int, *, decay: float, threshold: float,
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The definition: for every chunk, rank the whole past of its document."""
    batch, length = score.shape
    first = 0 if held is None else slots
    sets = torch.zeros(batch, layout.chunks + 1, slots, dtype=torch.int64, device=score.device)
    positions = torch.full_like(sets, -1)
    scores = score.new_zeros(batch, layout.chunks + 1, slots)
    segment = layout.segment_of_slot
    for b in range(batch):
        last = int((layout.end[b] - 1).clamp(min=0)) // layout.chunk
        for c in range(layout.chunks + 1):
            document = int(segment[b, -1 if c == layout.chunks else c * layout.chunk])
            past = []
            if held is not None and document == 0:
                past += [(float(held[0][b, e]), int(held[1][b, e]), e) for e in range(slots) if held[1][b, e] >= 0]
            for a in range(min(c * layout.chunk, length)):
                whole = a // layout.chunk < last or layout.complete[b, last]
                came = bool(layout.valid[b, a]) or a < int(layout.offset[b])
                if came and whole and int(segment[b, a]) == document:
                    past.append((float(score[b, a]), int(layout.position[b, a]), first + a))
            rate, tiny = -math.log(decay), torch.finfo(score.dtype).tiny
            past = [token for token in past if token[0] >= threshold]
            past.sort(key=lambda token: (math.log(max(token[0], tiny)) + rate * token[1], token[1]), reverse=True)
            for e, (value, place, where) in enumerate(past[:slots]):
                scores[b, c, e], positions[b, c, e], sets[b, c, e] = value, place, where
    return sets[:, :-1], positions[:, :-1], (scores[:, -1], positions[:, -1], sets[:, -1])


select = dispatched(chunked=select_chunked, naive=select_naive, fused={"cpu": "bmojo.memory.eidetic_cpu:select"})


def compact_positions(position: Tensor, start: Tensor, reach: int) -> Tensor:
    """Positions [..., E] for rotary keys that bound every distance: start - reach - E + rank, oldest first.

    `start` [...] is where the chunk starts, `reach` the tokens that window and fading span cover.
    """
    older = (position[..., None, :] < position[..., :, None]) & (position[..., None, :] >= 0)
    return start[..., None] - reach - position.shape[-1] + older.sum(-1)
