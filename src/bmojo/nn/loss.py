"""What a language model is trained on: cross entropy, and the auxiliary losses of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM
from bmojo.ops.cross_entropy import NO_LABEL, rows_at_once
from bmojo.ops.numerics import at_least_float32


def answers(
    model: BMojoLM, batch: Mapping[str, Tensor], trace: Trace | None = None, *, segment: int | None = None
) -> tuple[Tensor, Tensor]:
    """What the head reads where something is asked, [n, hidden_size], and the labels there, int64 [n], row by row.

    batch: int64 [rows, time] `tokens`, `labels` (NO_LABEL: nothing is asked) and optionally `document_ids`. With
    `segment`, so many tokens are read at once and the state is carried: the same answers in less memory.

    A batch with `decode`, int64 [rows, m], asks after the last token alone, and `labels` is [rows, m]: answer j is read
    off embedding(decode_j) + h, where h [hidden_size] is the feature of the last token, by the model with empty
    memories, so that all it knows of the row has passed through h. This is the decoder of the compression task of Poli
    et al. 2024 (MAD, arXiv 2403.17844) without parameters of its own.
    """
    labels, asked = batch["labels"], batch["labels"] != NO_LABEL
    if "decode" in batch:
        *_, (_, features) = _read(model, batch, trace, segment)
        codes = (model.embed(batch["decode"]) + features[:, -1:]).flatten(0, 1)[:, None]
        features, _ = model.features(codes, model.empty_state(len(codes)))  # a step: a call would fill whole chunks
        return features.unflatten(0, labels.shape)[asked][:, 0], labels[asked]
    found, places = [], []
    for start, features in _read(model, batch, trace, segment):
        row, time = asked[:, start : start + features.shape[1]].nonzero(as_tuple=True)
        found.append(features[row, time])
        places.append(row * labels.shape[1] + start + time)
    if len(found) == 1:
        return found[0], labels[asked]
    return torch.cat(found)[torch.cat(places).argsort()], labels[asked]


def _read(
    model: BMojoLM, batch: Mapping[str, Tensor], trace: Trace | None, segment: int | None
) -> Iterator[tuple[int, Tensor]]:
    """(place of the first, features) of each piece of the tokens."""
    tokens, document_ids, state = batch["tokens"], batch.get("document_ids"), None
    for start in range(0, tokens.shape[1], segment or tokens.shape[1]):
        part = slice(start, start + (segment or tokens.shape[1]))
        ids = None if document_ids is None else document_ids[:, part]
        features, state = model.features(tokens[:, part], state, document_ids=ids, trace=trace)
        yield start, features


def cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """-sum log softmax(logits)[label] / count, in nats and in float32 at least; zero if there is nothing to sum.

    Shapes: logits [tokens, vocab_size], labels int64 [tokens]. `count` is the number of tokens if None; who sums over
    several calls (gradient accumulation, several processes) gives that of all of them. For logits that are there
    anyway: `BMojoLM.cross_entropy` does without. Without gradients, only some rows of them are copied at a time.
    """
    rows = rows_at_once(logits.shape[-1])
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    costs = [F.cross_entropy(at_least_float32(x), y, ignore_index=NO_LABEL, reduction="sum") for x, y in parts]
    return torch.stack(costs).sum() / (max(1, labels.numel()) if count is None else count)


def auxiliary_trace(config: ModelConfig) -> Trace | None:
    """A trace to pass to a forward pass in training, if layers of this configuration have losses of their own."""
    return Trace() if config.has_auxiliary_losses else None


def auxiliary_loss(trace: Trace | None, share: Tensor | None = None) -> Tensor | float:
    """The sum of the losses that the layers noted, which carry their weights: of each the mean over the rows, or their
    sum weighted by `share` [batch], that of each row in all that a step is trained on."""
    if trace is None:
        return 0.0
    return sum(loss.mean() if share is None else (share * loss).sum() for loss in trace.losses)
