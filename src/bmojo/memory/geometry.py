"""Where the blocks stand that a layer finds in storage, and what they are found by; see `bmojo.memory.storage`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.ops.rope import rope_table, rotate


@dataclass(frozen=True)
class Geometry:
    """How a layer reads: `reach`, the tokens that stand between a chunk's start and a block found for it."""

    block: int
    keys: int
    stride: int
    queries: int
    blocks: int
    window: int
    chunk: int
    reach: int
    kv_heads: int
    head_dim: int
    theta: float
    compact: bool

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> Geometry:
        has, window = config.parts(config.kinds[layer]), config.window
        assert window is not None
        reach = window + config.fading_span * has.fading + config.eidetic_slots * has.eidetic
        return cls(
            config.storage_block, config.storage_keys, config.storage_stride, config.storage_queries,
            config.storage_blocks, window, config.chunk_size, reach, config.num_kv_heads, config.head_dim,
            config.rope_theta, config.positions == "compact",
        )  # fmt: skip

    def ring(self, *, decays: bool) -> int:
        """How many of the last queries are kept: those that ask, with decay all of a stride."""
        return max(self.stride, self.queries) if decays else self.queries

    def turn(self, x: Tensor, position: Tensor) -> Tensor:
        """x [..., heads, P] turned by positions [...] (broadcast)."""
        position = position.view(*(1,) * (x.ndim - 2 - position.ndim), *position.shape)
        return rotate(x, rope_table(position, self.head_dim, self.theta, x.dtype))

    def base(self, begin: Tensor) -> Tensor:
        """Where a block stands that is found for the stride from `begin` on."""
        return begin - begin % self.chunk - self.reach - self.block

    def asking(self, q: Tensor, begin: Tensor) -> Tensor:
        """Queries [..., n, H, P], turned by their positions, as index keys are compared with them: [..., n, D]."""
        q = self.turn(q, -self.base(begin)[..., None])
        q = q.unflatten(-2, (self.kv_heads, -1)).sum(-2) * self.head_dim**-0.5
        return q.flatten(-2)

    def stands(self, begin: Tensor, start: Tensor) -> Tensor:
        """Positions to turn the tokens of found blocks by [..., block], that start at `start` [...] of the row's own
        source, or far below 0, for the stride from `begin` [...] on."""
        inner = torch.arange(self.block, device=begin.device)
        base = self.base(begin)
        if not self.compact:
            base = torch.where(start < 0, base, start)
        return base[..., None] + inner

    def turned(self, k: Tensor) -> Tensor:
        """Keys [..., block, K, P] turned by their places in the block: [..., block, D]."""
        return self.turn(k, torch.arange(k.shape[-3], device=k.device)).flatten(-2)

    def found_by(self, k: Tensor, score: Tensor | None) -> Tensor:
        """What blocks are found by [..., r, D], from keys [..., block, K, P] not turned, and scores [..., block]."""
        count = k.shape[-3]
        k = self.turned(k)
        if score is None:
            return torch.stack([part.mean(-2) for part in k.tensor_split(min(self.keys, count), -2)], -2)
        index = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., : self.keys]
        return k.gather(-2, index[..., None].expand(*index.shape, k.shape[-1]))
