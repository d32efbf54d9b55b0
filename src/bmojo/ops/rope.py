"""Rotary positions (Su et al. 2021, arXiv 2104.09864), in the half-split convention of Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, head_dim] for integer positions [...] (negative ones allowed).

    Angles are taken in float64 where the device has it: in float32 they lose a digit of phase for each digit of
    position, which an endless stream would feel.
    """
    exact = torch.float32 if positions.device.type in ("mps", "xla") else torch.float64
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=exact, device=positions.device) / head_dim)
    angle = positions[..., None].to(exact) * frequency
    angle = torch.cat((angle, angle), -1)[..., None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [..., heads, head_dim] by the angles of `table`; the score of q_i and k_j then depends on i - j alone."""
    cos, sin = table
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
