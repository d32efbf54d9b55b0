"""Where each token of a call stands in the chunk-aligned sequence that every layer works on.

Chunks are counted from the start of a document, in tokens that are not padding. A call may begin in the middle of a
chunk, hold padding anywhere, and cross documents; a `Layout` moves its tokens to slots such that

    slot % chunk == position % chunk,     and a document starts a new chunk.

    time      0 1 2 3 4 5 6 7 8          (.: padding, |: a new document starts)
    tokens    . a b c|d e f g .          state: 2 tokens of a's document came before; chunk = 4
    slot      0 1 2 3 4 5 6 7 8 9 10 11
    tokens    . . a b c . . . d e f  g
    position  0 1 2 3 4 5 6 7 0 1 2  3   (slots 0 and 1 belong to the tokens that came before)

Slots without a token of this call are not `valid`; every op leaves its state as it is there.
Legend of shapes: B batch, T time of the call, L slots, N chunks (L = N * chunk), W window, F fading span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.errors import StateError
from bmojo.ops.rope import rope_table


@dataclass(frozen=True)
class Layout:
    time: int
    chunk: int
    valid: Tensor  # [B, L] bool
    position: Tensor  # [B, L] int64, within the document
    segment: Tensor  # [B, N] int64: documents counted within the call; 0 continues the state's
    offset: Tensor  # [B] slots of the first chunk taken by tokens that came before
    end: Tensor  # [B] the slot after the last token
    next_position: Tensor  # [B]
    document: Tensor  # [B] the document that the state now belongs to; -1: never told
    source: Tensor | None  # [B, L] index into time; None: slot t is token t
    slot: Tensor | None  # [B, T] its inverse
    mask: Tensor | None  # [B, T] bool; None: no padding
    continued: bool  # a state came in
    packed: bool  # documents may start inside the call
    whole: bool  # every slot holds a token of this call
    cache: dict = field(default_factory=dict, repr=False)

    @property
    def slots(self) -> int:
        return self.position.shape[1]

    @property
    def chunks(self) -> int:
        return self.segment.shape[1]

    @property
    def positions(self) -> list[int]:
        """Tokens of each row's document that came before the call, known to the host."""
        return self.once(("positions",), lambda: (self.position[:, 0] + self.offset).tolist())

    @property
    def resets(self) -> Tensor | None:
        """[B, N] bool: the chunk starts a new document; None if no document starts inside the call."""
        if not self.packed:
            return None
        before = F.pad(self.segment[:, :-1], (1, 0))
        return self.segment != before

    @property
    def complete(self) -> Tensor:
        """[B, N] bool: the last token of the chunk is there."""
        return self.valid[:, self.chunk - 1 :: self.chunk]

    @property
    def segment_of_slot(self) -> Tensor:
        return self.segment.repeat_interleave(self.chunk, 1)

    def place(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, L, ...], zero where there is no token."""
        if self.source is None:
            extra = self.slots - x.shape[1]
            return F.pad(x, (0, 0) * (x.ndim - 2) + (0, extra)) if extra else x
        shape = (*self.source.shape, *(1,) * (x.ndim - 2))
        placed = x.gather(1, self.source.view(shape).expand(-1, -1, *x.shape[2:]))
        return placed.masked_fill(~self.valid.view(shape), 0)

    def restore(self, y: Tensor) -> Tensor:
        """[B, L, ...] -> [B, T, ...], zero at padding."""
        if self.slot is None:
            return y[:, : self.time]
        shape = (*self.slot.shape, *(1,) * (y.ndim - 2))
        y = y.gather(1, self.slot.view(shape).expand(-1, -1, *y.shape[2:]))
        return y if self.mask is None else y.masked_fill(~self.mask.view(shape), 0)

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives: the same for every layer that asks for it under this key."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def rope(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = self.position[:1] if self.source is None and not self.continued else self.position
        return self.once(("rope", head_dim, theta, dtype), lambda: rope_table(rows, head_dim, theta, dtype))

    def extend(self, x: Tensor, tail: Tensor | None, lags: int) -> Tensor:
        """[B, L, D] -> [B, lags + L, D]: the values of the `lags` tokens before are put right before the first one."""
        if tail is None:
            return F.pad(x, (0, 0, lags, 0))
        if self.source is None:
            return torch.cat((tail.to(x.dtype), x), 1)
        index = (self.offset[:, None] + torch.arange(lags, device=x.device))[..., None].expand(-1, -1, x.shape[-1])
        return F.pad(x, (0, 0, lags, 0)).scatter(1, index, tail.to(x.dtype))

    def tail(self, extended: Tensor, lags: int) -> Tensor:
        """The values of the last `lags` tokens [B, lags, D] out of what `extend` gave; zero before the document."""

        def places() -> tuple[Tensor, Tensor]:
            lag = torch.arange(lags, device=extended.device)
            return (self.end[:, None] + lag)[..., None], (self.next_position[:, None] >= lags - lag)[..., None]

        index, known = self.once(("tail", lags), places)
        return extended.gather(1, index.expand(-1, -1, extended.shape[-1])) * known.to(extended.dtype)

    def history(self, ring: Tensor | None, values: Tensor, size: int, stride: int = 1) -> Tensor:
        """Values [B, L / stride, ...] of this call, with those in `ring` [B, size, ...] before them.

        Index size + a of the result is the entry of slot a * stride + stride - 1; the ring holds entry n at n % size.
        """
        per_chunk = self.chunk // stride
        if ring is None:
            return F.pad(values, (0, 0) * (values.ndim - 2) + (size, 0))
        first = (self.position[:, 0] // stride)[:, None]  # entry number of slot 0
        index = (first - size + torch.arange(size + per_chunk, device=ring.device)) % size
        shape = (*index.shape, *(1,) * (ring.ndim - 2))
        old = ring.gather(1, index.view(shape).expand(-1, -1, *ring.shape[2:])).to(values.dtype)
        if self.source is None:
            return torch.cat((old[:, :size], values), 1)
        here = torch.arange(per_chunk, device=ring.device) < (self.offset // stride)[:, None]
        head = torch.where(here.view(here.shape[0], per_chunk, *shape[2:]), old[:, size:], values[:, :per_chunk])
        return torch.cat((old[:, :size], head, values[:, per_chunk:]), 1)

    def ring(self, history: Tensor, size: int, stride: int = 1) -> Tensor:
        """The ring [B, size, ...] after this call: entry n of the last document at n % size, zero if there is none."""

        def places() -> tuple[Tensor, Tensor]:
            newest = (self.next_position // stride - 1)[:, None]
            place = torch.arange(size, device=history.device)
            number = newest - (newest - place) % size
            last_slot_entry = size + (self.end // stride - 1)[:, None]
            return (last_slot_entry - (newest - number)).clamp(min=0), number >= 0

        index, known = self.once(("ring", size, stride), places)
        shape = (*index.shape, *(1,) * (history.ndim - 2))
        rows = history.gather(1, index.view(shape).expand(-1, -1, *history.shape[2:]))
        return rows * known.view(shape).to(history.dtype)

    def sources(self, size: int, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Positions and segments [B, size + L / stride] of what `history` lays out; segment -1: there is nothing."""
        position = self.position[:, stride - 1 :: stride]
        segment = self.segment_of_slot[:, stride - 1 :: stride]
        back = torch.arange(-size, 0, device=position.device) * stride
        before = position[:, :1] + back
        known = (before >= 0) & bool(self.continued)
        position = torch.cat((before, position), 1)
        segment = torch.cat((known.long() - 1, segment), 1)
        return position, segment

    def reachable(self, size: int, stride: int, nearest: int, span: int) -> Tensor:
        """Mask [B or 1, N, chunk, keys] of what `blocks` lays out: positions in (i - nearest - span, i - nearest]."""

        def make() -> Tensor:
            position, segment = self.sources(size, stride)
            if self.source is None and not self.continued:
                position, segment = position[:1], segment[:1]
            query = self.position[: position.shape[0]].unflatten(1, (self.chunks, self.chunk))[..., None]
            at = blocks(position, self.chunks, self.chunk // stride, (nearest + span) // stride, nearest // stride)
            of = blocks(segment, self.chunks, self.chunk // stride, (nearest + span) // stride, nearest // stride)
            at, of = at[:, :, None], of[:, :, None]
            same = of == self.segment[: position.shape[0], :, None, None]
            return same & (at <= query - nearest) & (at > query - nearest - span) & (at >= 0)

        return self.once(("reachable", size, stride, nearest, span), make)


def blocks(x: Tensor, chunks: int, chunk: int, back: int, skip: int = 0) -> Tensor:
    """[B, back + chunks * chunk, ...] -> [B, chunks, back - skip + chunk, ...]: what chunk c can reach.

    Block c holds the entries from c * chunk to c * chunk + back - skip + chunk: its own entries, moved `skip` to the
    past, and the `back - skip` before. `back` and `skip` are whole chunks.
    """
    length = chunks * chunk
    views = [x[:, s : s + length].unflatten(1, (chunks, chunk)) for s in range(0, back - skip + 1, chunk)]
    return torch.cat(views, 2)


def make_layout(
    batch: int,
    time: int,
    chunk: int,
    device: torch.device,
    *,
    position: Tensor | None = None,
    document: Tensor | None = None,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Layout:
    """Lay out a call of [batch, time] tokens that continues a state at `position` [batch] of `document` [batch].

    `mask` [batch, time] is True (or nonzero) for tokens; `document_ids` [batch, time], at least 0, changes where a
    document starts.
    """
    continued = position is not None
    for name, given in (("mask", mask), ("document_ids", document_ids)):
        if given is not None and given.shape != (batch, time):
            raise StateError(f"{name} must have the shape of the tokens {(batch, time)}, got {tuple(given.shape)}")
    start = torch.zeros(batch, dtype=torch.int64, device=device) if position is None else position
    was = torch.full((batch,), -1, dtype=torch.int64, device=device) if document is None else document
    offset = start % chunk
    aligned = not continued or not bool(offset.any())
    if mask is not None:
        mask = mask.to(torch.bool)
        if bool(mask.all()):
            mask = None
    if document_ids is None and mask is None and aligned:
        chunks = max(1, -(-time // chunk))
        slots = torch.arange(chunks * chunk, device=device).expand(batch, -1)
        return Layout(
            time=time,
            chunk=chunk,
            valid=slots < time,
            position=start[:, None] + slots,
            segment=torch.zeros(batch, chunks, dtype=torch.int64, device=device),
            offset=offset,
            end=torch.full_like(start, time),
            next_position=start + time,
            document=was,
            source=None,
            slot=None,
            mask=None,
            continued=continued,
            packed=False,
            whole=time == chunks * chunk,
        )

    token = torch.ones(batch, time, dtype=torch.bool, device=device) if mask is None else mask
    order = torch.argsort(~token, dim=1, stable=True)  # tokens first, in their order
    index = torch.arange(time, device=device).expand(batch, -1)
    count = token.sum(1)
    is_token = index < count[:, None]
    boundary = torch.zeros_like(is_token)
    if document_ids is not None:
        if bool((document_ids < 0).any()):
            raise StateError(f"document_ids must be at least 0, got {int(document_ids.min())}")
        ids = document_ids.to(torch.int64).gather(1, order)
        before = torch.cat((was[:, None], ids[:, :-1]), 1)
        boundary = is_token & (ids != before) & (before >= 0)
        was = torch.where(count > 0, ids.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0], was)
    started = torch.where(boundary, index, -1).cummax(1).values  # index of the first token of the document, -1: state's
    at = torch.where(started < 0, start[:, None] + index, index - started)
    at_before = torch.cat((start[:, None] - 1, at[:, :-1]), 1)
    gap = torch.where(boundary, (-(at_before + 1)) % chunk, 0)  # slots left empty at the end of a document
    slot = offset[:, None] + index + gap.cumsum(1)
    end = torch.where(count > 0, slot.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0] + 1, offset)
    chunks = max(1, -(-int(end.max()) // chunk))
    length = chunks * chunk

    spare = length  # one slot more, for what is no token
    target = torch.where(is_token, slot, spare)

    def scatter(values: Tensor, fill: int) -> Tensor:
        return values.new_full((batch, length + 1), fill).scatter(1, target, values)[:, :length]

    source = scatter(order, 0)
    valid = scatter(is_token.long(), 0).bool()
    first = start - offset
    base = (
        scatter(at - slot, -(2**62)).unflatten(1, (chunks, chunk)).amax(2)
    )  # position minus slot, a constant of a chunk
    segment = scatter(boundary.cumsum(1), -1).unflatten(1, (chunks, chunk)).amax(2).cummax(1).values.clamp(min=0)
    base = torch.where(base > -(2**62), base, first[:, None])
    slots = torch.arange(length, device=device)
    restored = torch.zeros_like(slot).scatter(1, order, torch.where(is_token, slot, 0))
    return Layout(
        time=time,
        chunk=chunk,
        valid=valid,
        position=base.repeat_interleave(chunk, 1) + slots,
        segment=segment,
        offset=offset,
        end=end,
        next_position=torch.where(count > 0, at.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0] + 1, start),
        document=was,
        source=source,
        slot=restored,
        mask=mask,
        continued=continued,
        packed=document_ids is not None,
        whole=False,
    )
