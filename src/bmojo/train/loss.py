"""The training loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bmojo.data.packing import IGNORED_LABEL
from bmojo.nn.loss import auxiliary_loss, auxiliary_trace, cross_entropy
from bmojo.nn.model import BMojoLM


def next_token_loss(
    model: BMojoLM, batch: Mapping[str, Tensor], *, predicted: Tensor | int | None = None, share: float = 1.0
) -> Tensor:
    """Mean cross entropy, in nats per predicted token, plus head_loss_weight * the layers' auxiliary losses, if any.

    If `batch` holds but a `share` of the rows of a larger one, in which `predicted` tokens are, the result is its part
    of the loss of that: the parts sum to the whole, however the labels are spread.

    batch: int64 [batch, time] `tokens`, `labels` (IGNORED_LABEL: predict nothing here), and optionally `document_ids`.
    Logits are made at the labelled positions alone, and compared in float32 at least. Zero if nothing is labelled.
    """
    trace = auxiliary_trace(model.config)
    features, _ = model.features(batch["tokens"], document_ids=batch.get("document_ids"), trace=trace)
    labelled = batch["labels"] != IGNORED_LABEL
    loss = cross_entropy(model.logits(features[labelled]), batch["labels"][labelled], predicted)
    return loss + share * auxiliary_loss(model.config, trace)
