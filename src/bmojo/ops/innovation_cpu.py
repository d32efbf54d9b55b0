"""`bmojo.ops.innovation.rls` on CPUs in C++ (innovation_cpu.cpp): one factorisation a chunk, then one update a token.
Importing this module compiles it once; ImportError says why that can't be done here."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from bmojo.ops.innovation import RLS_CONDITION, RLS_RIDGE
from bmojo.ops.native import load_ops
from bmojo.ops.numerics import at_least_float32, exact

load_ops("innovation_cpu.cpp")


@exact
@torch.no_grad()
def rls(
    k: Tensor, valid: Tensor, A: Tensor, M: Tensor, *, chunk_size: int, forgetting: float, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `bmojo.ops.innovation.rls`; without gradients."""
    dtype = reduce(torch.promote_types, (z.dtype for z in (A, M)), at_least_float32(k).dtype)
    k, A, M = (z.to(dtype).contiguous() for z in (k, A, M))
    resets = None if resets is None else resets.contiguous()
    options = (chunk_size, forgetting, RLS_RIDGE, RLS_CONDITION)
    return torch.ops.bmojo.rls(k, valid.contiguous(), A, M, resets, *options)


@torch.library.register_fake("bmojo::rls")
def _(k, valid, A, M, resets, chunk_size, forgetting, ridge, condition):
    return k.new_empty(k.shape[:2]), torch.empty_like(A), torch.empty_like(M)
