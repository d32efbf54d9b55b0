"""The scans on CPUs in C++, as PyTorch knows them: compiled at import, with gradients, and shapes for compilers.

One step at a time on a state that stays in the cache, vectorised over channels, threads over rows and heads. Forward
keeps a state now and then; backward recomputes those between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from bmojo.ops.native import differentiable_once, load_ops

Shape = Sequence[int]


class Scan:
    """The ops bmojo::NAME_forward and NAME_backward of NAME_cpu.cpp as one function of five tensors and a state.

    `shapes` gives the shapes of the output [batch, time, ...] and of the state for those of the five; `span` is SPAN of
    scan_cpu.h, or of the C++ file where it has its own: the state of every span-th step is kept for backward.
    Raises ImportError if they can't be compiled here.
    """

    def __init__(self, name: str, shapes: Callable[..., tuple[Shape, Shape]], span: int = 64) -> None:
        load_ops(f"{name}_cpu.cpp")
        self.forward = getattr(torch.ops.bmojo, f"{name}_forward")
        self.backward = getattr(torch.ops.bmojo, f"{name}_backward")

        @torch.library.register_fake(f"bmojo::{name}_forward")
        def _(a, b, c, d, e, state, resets, chunk_size, exclusive, keep):
            output, last = shapes(*(z.shape for z in (a, b, c, d, e)))
            spans = -(-output[1] // span) if keep else 0
            return a.new_empty(output), a.new_empty(last), a.new_empty((last[0], spans, *last[1:]))

        @torch.library.register_fake(f"bmojo::{name}_backward")
        def _(dy, dlast, a, b, c, d, e, starts, resets, chunk_size):
            return tuple(torch.empty_like(z) for z in (a, b, c, d, e, dlast))

        differentiable_once(f"{name}_backward")
        torch.library.register_autograd(f"bmojo::{name}_forward", self._backward, setup_context=self._save)

    def __call__(
        self, inputs: Sequence[Tensor], state: Tensor | None, resets: Tensor | None, chunk_size: int, exclusive: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Output and final state, in the widest of the dtypes given. None: gradients of exclusive reads are not made
        here."""
        given = [*inputs] if state is None else [*inputs, state]
        keep = torch.is_grad_enabled() and any(z.requires_grad for z in given)
        if keep and exclusive:
            return None
        dtype = reduce(torch.promote_types, (z.dtype for z in given))
        given = [z.to(dtype).contiguous() for z in given]
        initial = None if state is None else given.pop()
        resets = None if resets is None else resets.contiguous()
        return self.forward(*given, initial, resets, chunk_size, exclusive, keep)[:2]

    @staticmethod
    def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
        *five, state, resets, ctx.chunk_size, _, _ = inputs
        ctx.has_state, ctx.output_shape = state is not None, output[0].shape
        ctx.save_for_backward(*five, output[2], resets)
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *five, starts, resets = ctx.saved_tensors
        dlast = torch.zeros_like(starts[:, 0]) if dlast is None else dlast.contiguous()
        dy = five[0].new_zeros(ctx.output_shape) if dy is None else dy.contiguous()
        *gradients, dstate = self.backward(dy, dlast, *five, starts, resets, ctx.chunk_size)
        return *gradients, dstate if ctx.has_state else None, None, None, None, None
