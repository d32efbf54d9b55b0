"""Learned admission: what a token's innovation counts for, when it competes for an eidetic slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo.ops.numerics import exact

LARGEST = 20.0  # of |g|: exp(g) stays far from the limits of float32


class Admission(nn.Module):
    """The odds that a token will be looked at while it is in a slot, told when it is written:

        g_t = w . [x_t, c_t] + b,          score_t = innovation_t * exp(g_t)

    with x the layer's input and c what keys are made from. The choice of slots has no gradient; w and b learn to
    predict, on detached inputs, u_p in [0, 1], the largest weight that any query and head gave to token p while it was
    in a slot, or was read from storage: the loss (`usage_loss`) is the binary cross entropy of sigmoid(g_p) against
    u_p, over the tokens that some query could see there. It starts at g = 0, innovation alone, and that decides which
    tokens are tried.

    x, c [..., D] -> g [...], float32 at least. Related: H2O (arXiv 2306.14048) keeps the tokens that were attended to
    most so far; here it is foretold, so that memory costs nothing but the slots.
    """

    no_decay = ("bias",)

    def __init__(self, hidden_size: int, *, shifted: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1 + shifted, hidden_size))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.bias.zero_()

    def forward(self, x: Tensor, shifted: Tensor) -> Tensor:
        return _log_odds(x, shifted, self.weight, self.bias)


@exact
def _log_odds(x: Tensor, shifted: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    parts = zip((x, shifted), weight.to(kind), strict=False)
    return sum((z.detach().to(kind) @ w for z, w in parts), bias.to(kind)).clamp(-LARGEST, LARGEST)


@exact
def usage_loss(g: Tensor, token: Tensor, used: Tensor, visible: Tensor) -> Tensor:
    """Binary cross entropy of sigmoid(g) against the largest use of each token that was visible in a slot, or from
    storage.

    Of each row the mean over its tokens, [batch].

    g [batch, n]; of every slot of every chunk [batch, chunks, slots]: `token`, which of all rows' [batch * n] it holds,
    its use in [0, 1], and whether some query could see it. Zero for a row of which no token could be seen.
    """
    token, used, visible = token.flatten(), used.flatten().to(g.dtype), visible.flatten().to(g.dtype)
    target = torch.zeros_like(g).flatten().scatter_reduce(0, token, used * visible, "amax").view_as(g)
    seen = torch.zeros_like(g).flatten().scatter_reduce(0, token, visible, "amax").view_as(g)
    loss = F.binary_cross_entropy_with_logits(g, target, weight=seen, reduction="none").sum(1)
    return loss / seen.sum(1).clamp(min=1)
