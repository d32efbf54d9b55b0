"""The one place that decides dtypes: states, scores, decay products and positions."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64 already (states, scores, decays)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeat_groups(x: Tensor, heads: int) -> Tensor:
    """[..., groups, size] -> [..., heads, size]: consecutive heads share a group."""
    groups = x.shape[-2]
    return x if groups == heads else x.repeat_interleave(heads // groups, dim=-2)
