"""One token for each row: where it is written, and what it may read. The counterpart of `Layout` for decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.memory.spec import CACHE_BLOCK
from bmojo.ops.attention import put
from bmojo.ops.dispatch import device_type
from bmojo.ops.rope import rope_table


@dataclass(frozen=True)
class Step:
    """The token at `position` [B] of each row. `donate`: the buffers of the state that came in may be written to."""

    position: Tensor
    document: Tensor
    chunk: int
    donate: bool = False
    cache: dict = field(default_factory=dict, repr=False)

    @property
    def next_position(self) -> Tensor:
        return self._once("next", lambda: self.position + 1)

    @property
    def positions(self) -> list[int]:
        """Known to the host."""
        return self._once("positions", self.position.tolist)

    @property
    def ends_chunk(self) -> Tensor:
        """[B] bool: this token completes its chunk."""
        return self._once("ends", lambda: self.next_position % self.chunk == 0)

    @property
    def any_ends_chunk(self) -> bool:
        """Whether there is a chunk to end. A graph that is compiled or captured once for all tokens always does what
        that takes, and so does a device that the host would have to wait for."""
        if torch.compiler.is_compiling() or device_type(self.position) != "cpu":
            return True
        return self._once("any ends", lambda: bool(self.ends_chunk.any()))

    def _once(self, key, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def rope(self, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A table for x [B, heads, head_dim]."""
        return self._once(("rope", head_dim, theta, dtype), lambda: rope_table(self.position, head_dim, theta, dtype))

    def own(self, buffer: Tensor) -> Tensor:
        """A buffer of the state that came in, to be written to: itself if it was given up, or a copy."""
        return buffer if self.donate else buffer.clone()

    def put(self, rows: Tensor, index: Tensor, value: Tensor) -> Tensor:
        """`rows` [B, n, ...] with row `index` [B] replaced by `value` [B, ...]."""
        return put(self.own(rows), index, value)

    def put_in_ring(self, ring: Tensor, value: Tensor, stride: int = 1) -> Tensor:
        """Write entry position // stride, if this token completes it."""
        if stride == 1:
            return self.put(ring, self.position % ring.shape[1], value)
        if not self.any_ends_chunk:
            return ring
        due = torch.arange(ring.shape[1], device=ring.device) == (self.position // stride % ring.shape[1])[:, None]
        due = (due & self.ends_chunk[:, None]).view(*ring.shape[:2], *(1,) * (ring.ndim - 2))
        return torch.where(due, value[:, None].to(ring.dtype), ring)

    def reachable(self, size: int, stride: int, nearest: int, span: int) -> Tensor:
        """Mask [B, size] of the ring entries with a position in (i - nearest - span, i - nearest]."""

        def make() -> Tensor:
            newest = (self.next_position // stride - 1)[:, None]
            number = newest - (newest - torch.arange(size, device=newest.device)) % size
            position = number * stride + stride - 1
            here = self.position[:, None] - nearest
            return (number >= 0) & (position <= here) & (position > here - span)

        return self._once(("reach", size, stride, nearest, span), make)

    def reachable_in_cache(self, size: int) -> Tensor:
        """Mask [B, size] of an unbounded cache: everything up to this token."""
        here = self.position[:, None]
        return self._once(("cache", size), lambda: torch.arange(size, device=here.device) <= here)

    def room(self, rows: Tensor) -> Tensor:
        """An unbounded cache [B, n, ...] with room for this token in every row. On XLA devices, where shapes are fixed,
        it is left as it is: who made it has made it large enough."""
        if device_type(rows) == "xla":
            return rows
        return grow(rows, self._once("longest", lambda: int(self.next_position.max())))


def grow(rows: Tensor, length: int) -> Tensor:
    """`rows` [B, n, ...] padded to at least `length`, by whole blocks."""
    missing = -(-length // CACHE_BLOCK) * CACHE_BLOCK - rows.shape[1]
    return F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing)) if missing > 0 else rows
