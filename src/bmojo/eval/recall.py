"""Associative recall by the distance between a pair and its question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bmojo.data.synthetic.mqar import MQAR, NO_ANSWER
from bmojo.errors import ConfigError
from bmojo.nn.model import BMojoLM


@torch.inference_mode()
def recall(
    model: BMojoLM, task: MQAR, distances: Sequence[int], *, rows: int = 64, batch_size: int = 8
) -> list[dict[str, Any]]:
    """`distance`, `pairs`, `accuracy`, `chance`, `length` for each distance (tokens), on `rows` sequences each.

    accuracy: the share of questions where the most likely of all tokens is the stored answer.
    Raises DataError for a distance that does not fit the task.
    """
    if model.config.vocab_size < task.vocab_size:
        raise ConfigError(f"vocab_size must be at least the task's {task.vocab_size}, got {model.config.vocab_size}")
    device = model.embed.weight.device
    scores = []
    for distance in distances:
        batch = task.at_distance(distance, rows)
        tokens, labels = (torch.from_numpy(batch[name]).to(device) for name in ("tokens", "labels"))
        right = 0
        for part, label in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
            asked = label != NO_ANSWER
            features, _ = model.features(part)
            right += int((model.logits(features[asked]).argmax(-1) == label[asked]).sum())
        scores.append(
            {
                "distance": distance,
                "pairs": task.pairs,
                "accuracy": right / (rows * task.pairs),
                "chance": task.chance,
                "length": task.length,
            }
        )
    return scores
