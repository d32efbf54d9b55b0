"""The one place that decides dtypes: states, scores, decay products and positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmojo.ops.dispatch import device_type, first_tensor


def exact(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with autocast off: what it makes float32 stays float32, whatever the autocast dtype."""

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first_tensor(args, kwargs).device.type, enabled=False):
            return op(*args, **kwargs)

    return run


def widest(x: Tensor) -> Tensor:
    """`x` in float64, where the device has it: for sums and positions whose differences must keep their digits."""
    return x if device_type(x) in ("mps", "xla") else x.double()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64 already (states, scores, decays)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeat_groups(x: Tensor, heads: int) -> Tensor:
    """[..., groups, size] -> [..., heads, size]: consecutive heads share a group."""
    groups = x.shape[-2]
    shape = (*x.shape[:-1], heads // groups, x.shape[-1])
    return x if groups == heads else x[..., None, :].expand(shape).flatten(-3, -2)
