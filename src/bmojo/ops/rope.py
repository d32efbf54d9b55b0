"""Rotary positions (Su et al. 2021, arXiv 2104.09864), in the half-split convention of Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import widest


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, head_dim] for integer positions [...] (negative ones allowed).

    Angles are taken in float64 where the device has it: in float32 they lose a digit of phase for each digit of
    position, which an endless stream would feel.
    """
    exponent = widest(torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)) / head_dim
    angle = positions[..., None].to(exponent.dtype) * theta**-exponent
    angle = torch.cat((angle, angle), -1)[..., None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [..., heads, head_dim] by the angles of `table`; the score of q_i and k_j then depends on i - j alone."""
    cos, sin = table
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


rotate = dispatched(chunked=_rotate, naive=_rotate, fused={"cpu": "bmojo.ops.layers_cpu:rotate"})
