"""Accuracy on a synthetic task, by the distance between a fact and its question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bmojo.data.synthetic import EVALUATION, MQAR, Task, make_task
from bmojo.errors import ConfigError, DataError
from bmojo.eval.text import predictions
from bmojo.nn.loss import NO_LABEL, answers
from bmojo.nn.model import BMojoLM

SEGMENT = 1024  # tokens read at once; bounds the memory that a long sequence takes
ROWS_DRAWN = 16  # of one batch number: what is asked does not depend on batch_size
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Answers:
    """One entry a question, row by row."""

    row: NDArray[np.int64]
    right: NDArray[np.bool_]  # the most likely of all tokens is the answer
    bits: NDArray[np.float64]  # -log2 p(answer)
    distance: NDArray[np.int64]  # tokens from the fact; 0: the task doesn't say
    stale: NDArray[np.bool_] | None  # the most likely token is what was true before; None: no fact of the task changes

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)

        return cls(*map(joined, cls.__dataclass_fields__))


@torch.inference_mode()
def read_answers(
    model: BMojoLM, batch: Mapping[str, NDArray[np.int64]], *, batch_size: int = 8, segment: int = SEGMENT
) -> Answers:
    """The model's answers to a batch of a task; neither `batch_size` nor `segment` (tokens) matter to them."""
    device = model.embed.weight.device
    scores = []
    for start in range(0, len(batch["tokens"]), batch_size):
        part = {
            name: torch.from_numpy(np.ascontiguousarray(batch[name][start : start + batch_size])).to(device)
            for name in ("tokens", "labels", "decode")
            if name in batch
        }
        scores.append(predictions(model, *answers(model, part, segment=segment)))
    bits, told = (np.concatenate(values) for values in zip(*scores, strict=True))
    asked = batch["labels"] != NO_LABEL
    return Answers(
        row=asked.nonzero()[0],
        right=told == batch["labels"][asked],
        bits=bits,
        distance=batch["distance"][asked] if "distance" in batch else np.zeros(len(told), np.int64),
        stale=told == batch["stale"][asked] if "stale" in batch else None,
    )


def ask(
    model: BMojoLM, task: Task, *, rows: int, batch_size: int = 8, seed: int = 0, segment: int = SEGMENT
) -> Answers:
    """The answers to `rows` rows that training never draws, others for each `seed`.

    Raises ConfigError if the vocabulary of the model is smaller than the task's, DataError if nothing is asked.
    """
    require_vocabulary(model, task)
    if rows < 1 or seed < 0:
        raise ConfigError(f"rows must be at least 1 and seed at least 0, got {rows} and {seed}")
    parts = []
    for first in range(0, rows, ROWS_DRAWN):
        drawn = task.batch(EVALUATION + (seed << 20) + first // ROWS_DRAWN, ROWS_DRAWN)
        drawn = {name: values[: rows - first] for name, values in drawn.items()}
        found = read_answers(model, drawn, batch_size=batch_size, segment=segment)
        parts.append(replace(found, row=found.row + first))
    found = Answers.join(parts)
    if not len(found.row):
        raise DataError(f"the task asks nothing in {rows} rows; take more rows, or change its settings")
    return found


def score_task(
    model: BMojoLM, task: Task, *, rows: int = 64, batch_size: int = 8, seed: int = 0, segment: int = SEGMENT
) -> dict[str, Any]:
    """How often the model answers a task rightly, over `rows` rows of evaluation:

    accuracy      share of the questions whose answer is the most likely of all tokens
    ci95          its 95 % interval (see `interval`)
    bits          mean -log2 p(answer)
    chance        accuracy of a guess among the possible answers
    questions     how many there were
    by_distance   [low, high, accuracy, questions] of those with low <= distance < high (powers of two), where there are
                  any; distance: tokens from the fact to the question
    stale         share answered with what was true before the last change, None if no fact of the task changes

    It depends on `batch_size` and `segment` by rounding alone. Raises ConfigError for a vocabulary that is too small.
    """
    found = ask(model, task, rows=rows, batch_size=batch_size, seed=seed, segment=segment)
    return {
        "accuracy": float(found.right.mean()),
        "ci95": interval(found.right, found.row),
        "bits": float(found.bits.mean()),
        "chance": task.chance,
        "questions": len(found.right),
        "by_distance": list(_by_distance(found)),
        "stale": None if found.stale is None else float(found.stale.mean()),
    }


def _by_distance(found: Answers) -> Iterator[list[float]]:
    power = np.where(found.distance > 0, np.frexp(found.distance)[1] - 1, -1)
    for exponent in np.unique(power[power >= 0]):
        right = found.right[power == exponent]
        yield [2 ** int(exponent), 2 ** (int(exponent) + 1), float(right.mean()), len(right)]


def interval(right: NDArray[np.bool_], row: NDArray[np.int64]) -> list[float]:
    """95 % interval of a share by Wilson's formula, [low, high].

    Questions of one row are not independent: their number n is divided by the design effect, the variance of the share
    between rows over that of n independent questions, if that is above 1; a share of 0 or 1 tells none.
    Source: Korn and Graubard 1998, Survey Methodology 24, with Wilson's interval in place of the exact one.
    """
    n, share = float(len(right)), float(right.mean())
    _, index, counts = np.unique(row, return_inverse=True, return_counts=True)
    hits = np.bincount(index, right)
    if 0 < share < 1 and len(counts) > 1:
        between = ((hits - share * counts) ** 2).sum() * len(counts) / (len(counts) - 1) / n**2
        n /= max(1.0, between / (share * (1 - share) / n))
    return wilson(share, n)


def wilson(share: float, n: float) -> list[float]:
    """95 % interval of a share of n independent trials. Source: Wilson 1927, JASA 22."""
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return [max(0.0, float(middle - half)), min(1.0, float(middle + half))]


def fitting_task(model: BMojoLM, record: dict[str, Any]) -> Task:
    """The task of a record (`task_record`). Raises BMojoError for settings out of range or a vocabulary too small."""
    task = make_task(**record)
    require_vocabulary(model, task)
    return task


def require_vocabulary(model: BMojoLM, task: Task) -> None:
    if model.config.vocab_size < task.vocab_size:
        raise ConfigError(f"vocab_size must be at least the task's {task.vocab_size}, got {model.config.vocab_size}")


def recall(
    model: BMojoLM, task: MQAR, distances: Sequence[int], *, rows: int = 64, batch_size: int = 8
) -> list[dict[str, Any]]:
    """`distance`, `pairs`, `accuracy`, `chance`, `length` for each distance (tokens), on `rows` sequences each.

    accuracy: the share of questions where the most likely of all tokens is the stored answer.
    Raises DataError for a distance that does not fit the task.
    """
    require_vocabulary(model, task)
    scores = []
    for distance in distances:
        found = read_answers(model, task.at_distance(distance, rows), batch_size=batch_size)
        of = {"pairs": task.pairs, "accuracy": float(found.right.mean()), "chance": task.chance, "length": task.length}
        scores.append({"distance": distance, **of})
    return scores
