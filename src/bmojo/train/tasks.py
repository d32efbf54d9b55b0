"""Training rows from synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Batches(Protocol):
    def batch(self, number: int, rows: int, /) -> dict[str, np.ndarray]: ...


def task_rows(tasks: Sequence[Batches], batch_size: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Training row i, where batch n is that of the task n mod len(tasks): all its rows are of one kind.

    A batch is drawn as a whole, so the newest one is kept.
    """
    newest: dict[int, dict[str, np.ndarray]] = {}

    def row(i: int) -> dict[str, np.ndarray]:
        number, place = divmod(i, batch_size)
        if number not in newest:
            newest.clear()
            newest[number] = tasks[number % len(tasks)].batch(number, batch_size)
        return {name: values[place] for name, values in newest[number].items()}

    return row
