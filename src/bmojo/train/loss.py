"""The training loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bmojo.nn.loss import answers, auxiliary_loss, auxiliary_trace
from bmojo.nn.model import BMojoLM


def next_token_loss(
    model: BMojoLM, batch: Mapping[str, Tensor], *, predicted: Tensor | int | None = None, share: float = 1.0
) -> Tensor:
    """Mean cross entropy, in nats per predicted token, plus the layers' auxiliary losses, if any.

    If `batch` holds but a `share` of the rows of a larger one, in which `predicted` tokens are, the result is its part
    of the loss of that: the parts sum to the whole, however the labels are spread.

    `batch` is as in `answers`: logits are made where something is asked alone, some at a time, and compared in float32
    at least. The cross entropy is zero if nothing is.
    """
    trace = auxiliary_trace(model.config)
    features, labels = answers(model, batch, trace)
    count = max(1, labels.numel()) if predicted is None else predicted
    return model.cross_entropy(features, labels) / count + share * auxiliary_loss(trace)
