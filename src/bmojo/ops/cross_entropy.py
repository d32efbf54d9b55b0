"""Cross entropy of a linear head, without its logits.

    L = sum_i (log sum_v exp(z_iv) - z_i,label_i),    z = x W^T,    dL/dz = softmax(z) - onehot(label)

Shapes: x [n, size]; weight [vocab_size, size]; labels int64 [n], NO_LABEL where nothing is asked.
Returns the sum in nats, float32 (float64 if x is), 0 if nothing is asked. Under autocast the products are in its dtype,
as those of any linear map.
Source of the chunks: Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32

NO_LABEL = -100  # as in torch's cross entropy: predict nothing here
LOGIT_BYTES = 32 * 2**20  # of the float32 logits that are held at once, if one row is not more


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits are held at once."""
    return max(1, LOGIT_BYTES // (4 * vocab_size))


def linear_cross_entropy_naive(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition: all logits at once."""
    logits = at_least_float32(F.linear(x, weight))
    return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")


def linear_cross_entropy_chunked(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Some rows at a time, whose gradients are taken at once: kept are those of x and of the weight, and no logits.

    Beside these it holds two chunks of logits (LOGIT_BYTES), whatever n is. If there is but one chunk, which saves
    nothing, this is the definition; with more, it can't be differentiated twice.
    """
    if len(x) <= rows_at_once(len(weight)):
        return linear_cross_entropy_naive(x, weight, labels)
    kind, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    return _Chunked.apply(x, weight, labels, dtype, *wanted)[0]


class _Chunked(torch.autograd.Function):
    """The sum, and its gradients (None where not wanted), which are outputs so that transforms can see them."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, wants_dx: bool, wants_dw: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # cast here, not by autocast: its cache would hand this copy, which has no graph, to later products
        w = weight.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        total = x.new_zeros((), dtype=exact)
        dw = torch.zeros_like(weight, dtype=exact) if wants_dw else None
        dx = []
        rows = rows_at_once(len(weight))
        for part, label in zip(x.split(rows), labels.split(rows), strict=True):
            h, asked = part.to(dtype), (label != NO_LABEL)[:, None]
            label = torch.where(asked, label[:, None], 0)
            log_p = F.linear(h, w).to(exact).log_softmax(-1)
            total = total - torch.where(asked, log_p.gather(1, label), 0).sum()
            if not (wants_dx or wants_dw):
                continue
            dz = log_p.exp_().scatter_add_(1, label, -torch.ones_like(log_p[:, :1])).to(dtype)
            if wants_dx:
                dx.append(torch.where(asked, dz @ w, 0).to(x.dtype))
            if dw is not None:
                h = torch.where(asked, h, 0)
                dw = dw.addmm_(dz.mT, h) if dz.dtype == exact else dw.add_(dz.mT @ h)
        return total, torch.cat(dx) if wants_dx else None, dw

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, weight, *_ = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*(gradient for gradient in gradients if gradient is not None))
        ctx.save_for_backward(*gradients)
        ctx.dtype = weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else dx * gradient
        dw = None if dw is None else (dw * gradient).to(ctx.dtype)
        return dx, dw, None, None, None, None


linear_cross_entropy = dispatched(chunked=linear_cross_entropy_chunked, naive=linear_cross_entropy_naive)
