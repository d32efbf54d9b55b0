"""The training loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.data.packing import IGNORED_LABEL
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM


def next_token_loss(model: BMojoLM, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy, in nats per predicted token, plus head_loss_weight * the layers' auxiliary losses, if any.

    batch: int64 [batch, time] `tokens`, `labels` (IGNORED_LABEL: predict nothing here), and optionally `document_ids`.
    Logits are made at the labelled positions alone, and compared in float32 at least. Zero if nothing is labelled.
    """
    trace = Trace() if model.config.innovation == "head" else None
    features, _ = model.features(batch["tokens"], document_ids=batch.get("document_ids"), trace=trace)
    labelled = batch["labels"] != IGNORED_LABEL
    labels = batch["labels"][labelled]
    logits = model.logits(features[labelled])
    exact = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits.to(exact), labels, reduction="sum") / max(1, labels.numel())
    if trace is not None:
        loss = loss + model.config.head_loss_weight * sum(trace.losses)
    return loss
