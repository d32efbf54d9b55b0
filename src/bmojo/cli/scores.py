"""Scores of a model on variants of a task, as a table or JSON: for `eval recall`, `eval mad` and `eval length`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bmojo.errors import BMojoError, ConfigError

if TYPE_CHECKING:
    from bmojo.data.synthetic import Task
    from bmojo.nn.model import BMojoLM

Rows = Annotated[int, typer.Option(min=1, help="Sequences for each score.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences read side by side; changes nothing but the time.")]
TRAINED = "as the model was trained on it"
OTHER = "not what the model was trained on, but settings that fit its vocabulary"
TIMES = (1, 2, 4, 8, 16)  # the length that a model was trained at

Change = dict[str, Any]


def parse_numbers(option: str, text: str | None) -> list[int] | None:
    """`"4,8,16"` as numbers of at least 1; None if the option was left out."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} takes whole numbers of at least 1 with commas between them, got {text!r}")
    return numbers


class Scores:
    """Scores of `model` on a task of the settings `base`, and on what some changes to them make of it."""

    def __init__(self, model: BMojoLM, base: dict[str, Any], *, rows: int, batch_size: int, seed: int) -> None:
        from bmojo.eval.tasks import fitting_task

        self.model, self.base = model, base
        self.how = {"rows": rows, "batch_size": batch_size, "seed": seed}
        self.own = fitting_task(model, base)
        self.tasks: list[tuple[Change, Task]] = [({}, self.own)]
        self.left_out: list[dict[str, Any]] = []

    def add(self, changes: Iterable[Change], *, required: bool = False, same_ids: bool = False) -> None:
        """Score these too. What does not fit the task or the model raises if it is `required`, or else is noted.

        same_ids: nor does a vocabulary of another size, in which the ids mean something else.
        """
        from bmojo.eval.tasks import fitting_task

        for change in changes:
            try:
                task = fitting_task(self.model, self.base | change)
                if same_ids and task.vocab_size != self.own.vocab_size:
                    trained = f"ids of the {self.own.vocab_size} tokens that the model was trained on"
                    raise ConfigError(f"its {task.vocab_size} tokens are not the {trained}; train a model on them")
            except BMojoError as error:
                if required:
                    raise
                self.left_out.append({"change": change, "reason": str(error)})
            else:
                if all(task != known for _, known in self.tasks):
                    self.tasks.append((change, task))

    def score(self) -> list[dict[str, Any]]:
        from bmojo.eval import score_task

        return [{"change": change, **score_task(self.model, task, **self.how)} for change, task in self.tasks]

    def show(self, first_line: str, trained_on: dict[str, Any] | None, as_json: bool) -> None:
        """Score all, and print that: JSON, or a table with the first task's accuracy by distance below."""
        scores = self.score()
        if as_json:
            content = {"task": self.base, "trained_on": trained_on, "scores": scores, "left_out": self.left_out}
            print(json.dumps({**content, **self.how}))
            return
        base = dict(self.base)
        print(f"{base.pop('name')}, {first_line}: {_settings(base)}")
        names = ("", "accuracy", "95 % interval", "chance", "bits", "questions")
        changing = scores[0]["stale"] is not None
        print_table(names + ("stale",) * changing, map(_cells, scores))
        if bins := scores[0]["by_distance"]:
            print("\nby distance from the fact to the question, with these settings")
            cells = [[f"{low:,} to {high - 1:,}", f"{share:.3f}", f"{count:,}"] for low, high, share, count in bins]
            print_table(("tokens", "accuracy", "questions"), cells)
        print_left_out(self.left_out)


def print_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


def print_left_out(left_out: list[dict[str, Any]]) -> None:
    for entry in left_out:
        print(f"left out: {_settings(entry['change'])}: {entry['reason']}")


def _settings(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _cells(score: dict[str, Any]) -> list[str]:
    low, high = score["ci95"]
    cells = [_settings(score["change"]) or "these settings", f"{score['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
    cells += [f"{score['chance']:.3f}", f"{score['bits']:.2f}", f"{score['questions']:,}"]
    return cells if score["stale"] is None else [*cells, f"{score['stale']:.3f}"]
