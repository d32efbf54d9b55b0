"""Synthetic tasks, one generator a file: seeded, vectorised, random access by batch number. Needs numpy only.

task = make_task("mqar", length=256, pairs=16)
batch = task.batch(0, 32)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bmojo.data.synthetic.compression import Compression
from bmojo.data.synthetic.copying import SelectiveCopying
from bmojo.data.synthetic.drift import Drift
from bmojo.data.synthetic.fuzzy import FuzzyRecall
from bmojo.data.synthetic.induction import Induction
from bmojo.data.synthetic.linear_gaussian import LinearGaussian
from bmojo.data.synthetic.lookup import Lookup
from bmojo.data.synthetic.markov_tree import MarkovTree
from bmojo.data.synthetic.memorization import Memorization
from bmojo.data.synthetic.mqar import MQAR, ZOOLOGY
from bmojo.data.synthetic.needle import Needle
from bmojo.data.synthetic.phone_book import PhoneBook
from bmojo.data.synthetic.recall import InContextRecall, NoisyRecall
from bmojo.data.synthetic.task import EVALUATION, NO_ANSWER, Task
from bmojo.data.synthetic.universal import Universal
from bmojo.errors import DataError, nearest

TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "in_context_recall": InContextRecall,
    "noisy_recall": NoisyRecall,
    "fuzzy_recall": FuzzyRecall,
    "memorization": Memorization,
    "compression": Compression,
    "selective_copying": SelectiveCopying,
    "needle": Needle,
    "lookup": Lookup,
    "phone_book": PhoneBook,
    "induction": Induction,
    "drift": Drift,
    "markov_tree": MarkovTree,
    "linear_gaussian": LinearGaussian,
    "universal": Universal,
}

# MAD's harder settings (arXiv 2403.17844), each a change of one setting of the baseline, which is the default. Beside
# these it trains on fewer examples than the baseline's 12,800: 6400, 3200, 1600 and 800.
_HARDER_RECALL: dict[str, tuple[float, ...]] = {"symbols": (32, 64, 128), "length": (256, 512, 1024)}
MAD_HARDER: dict[str, dict[str, tuple[float, ...]]] = {
    "in_context_recall": _HARDER_RECALL,
    "noisy_recall": {**_HARDER_RECALL, "symbols": (48, 80, 144), "noise": (0.4, 0.6, 0.8)},
    "fuzzy_recall": _HARDER_RECALL,
    "memorization": {"symbols": (512, 1024, 2048, 4096, 8192)},
    "compression": {"symbols": (32, 64, 128), "length": (64, 128, 256)},
    "selective_copying": {"symbols": (32, 64, 128), "length": (512, 1024), "copies": (32, 64, 96)},
}

__all__ = ["EVALUATION", "MAD_HARDER", "MQAR", "NO_ANSWER", "TASKS", "ZOOLOGY", "Task", "make_task", "task_record"]


def make_task(name: str, **fields: Any) -> Task:
    """The task of this name with these settings; DataError for a name or setting that is unknown or missing."""
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    known = {field.name: field for field in dataclasses.fields(TASKS[name])}
    for field in fields:
        if field not in known:
            raise DataError(f"{name} has no setting {field!r}; {nearest(field, known)}")
    for field, declared in known.items():
        if declared.default is dataclasses.MISSING and field not in fields:
            raise DataError(f"{name} needs the setting {field!r}; give {field}=N")
    return TASKS[name](**fields)


def task_record(task: Task) -> dict[str, Any]:
    """{"name": ..., **settings}, such that `make_task(**task_record(task)) == task`."""
    (name,) = (name for name, kind in TASKS.items() if kind is type(task))
    settings = (field.name for field in dataclasses.fields(task) if field.metadata.get("record", True))
    return {"name": name, **{setting: getattr(task, setting) for setting in settings}}
