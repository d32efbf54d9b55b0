"""What a language model is trained on: cross entropy, and the auxiliary losses of its layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.nn.mixer import Trace


def cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """-sum log softmax(logits)[label] / count, in nats and in float32 at least; zero if there is nothing to sum.

    Shapes: logits [tokens, vocab_size], labels int64 [tokens]. `count` is the number of tokens if None; who sums over
    several calls (gradient accumulation, several processes) gives that of all of them.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.to(exact), labels, reduction="sum")
    return total / (max(1, labels.numel()) if count is None else count)


def auxiliary_trace(config: ModelConfig) -> Trace | None:
    """A trace to pass to a forward pass in training, if layers of this configuration have losses of their own."""
    return Trace() if config.innovation == "head" else None


def auxiliary_loss(config: ModelConfig, trace: Trace | None) -> Tensor | float:
    """head_loss_weight * the sum of the losses that the layers noted."""
    return 0.0 if trace is None else config.head_loss_weight * sum(trace.losses)
