"""What a sweep trains: the trials of a grid, each a plain value with an id.

    sweep = Sweep(task="mqar", models=("gdn", "bmojo"),
                  axes=(({"length": 256},), ({"pairs": 16},), ({"learning_rate": 1e-3}, {"learning_rate": 3e-3})))
    trials, notes = sweep.expand()

The settings are the fields of the task, of TrainSettings and of ModelConfig.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bmojo import presets
from bmojo.config import ModelConfig
from bmojo.data.synthetic import TASKS, make_task, task_record
from bmojo.errors import BMojoError, ConfigError, nearest
from bmojo.nn.count import parameters
from bmojo.train.settings import TrainSettings

Changes = dict[str, Any]
Axis = tuple[Changes, ...]  # alternatives, each one setting or several that change together

DEFAULTS: Changes = {"steps": 1000, "batch_size": 32}
TOLERANCE = 0.02  # relative difference in parameters, and
STATE_TOLERANCE = 0.1  # shortfall in state bytes, beyond which a model is named
ELSEWHERE = {"seed": "--seeds seeds task, weights and training alike", "seq_len": "it is the task's length"}


@dataclass(frozen=True)
class Trial:
    """One training: everything that decides its result, what is measured of it, and where in the grid it stands."""

    model: str
    config: ModelConfig
    settings: TrainSettings
    tasks: tuple[Changes, ...]  # records of the variants that the batches cycle through
    evaluations: tuple[Changes, ...]  # records of what is scored; the first is the task that it is trained for
    varied: Changes  # the settings on axes of the grid that it reads

    @cached_property
    def content(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "configuration": self.config.to_dict(),
            "settings": self.settings.to_dict(),
            "tasks": list(self.tasks),
        }

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits of the content: the same training has the same id in any grid.

        Values that are the default have no part in it, so a setting that a later version adds makes no other trial.
        """
        own = {"model": self.model, "configuration": _given(self.config.to_dict(), ModelConfig().to_dict()),
               "settings": _given(self.settings.to_dict(), _defaults(TrainSettings)),
               "tasks": [_given(record, _defaults(TASKS[record["name"]])) for record in self.tasks]}  # fmt: skip
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return named(self.model, self.varied)


def _given(values: Changes, defaults: Changes) -> Changes:
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def _defaults(owner: Any) -> Changes:
    return {
        field.name: field.default for field in dataclasses.fields(owner) if field.default is not dataclasses.MISSING
    }


def shown(value: Any) -> str:
    """A setting as it is given on the command line."""
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def named(model: str, settings: Mapping[str, Any]) -> str:
    """ "bmojo, window=16" """
    return ", ".join([model, *(f"{name}={shown(value)}" for name, value in settings.items())])


def settings_of(task: str) -> dict[str, tuple[str, str]]:
    """The settings of a sweep over a task: the owner of each ("model", "train" or "task") and its declared type."""
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; {nearest(task, TASKS)}")
    known: dict[str, tuple[str, str]] = {}
    for owner, of in (("model", ModelConfig), ("train", TrainSettings), ("task", TASKS[task])):
        fields = (field for field in dataclasses.fields(of) if field.metadata.get("record", True))
        known |= {field.name: (owner, str(field.type)) for field in fields}
    return {name: found for name, found in known.items() if name not in ELSEWHERE}


def require_known(names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name in ELSEWHERE:
            raise ConfigError(f"{name} can't be set: {ELSEWHERE[name]}")
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; {nearest(name, known)}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid of trainings on `task`.

    axes          every combination of an alternative of each is a point of the grid; one alternative fixes a setting
    state_bytes   an axis more: `presets.at_state` sizes the memory of each model to at most so many bytes
    train_on      axes of the task's fields; the batches of a training cycle through all their combinations
    eval_on       changes of the task's fields; the trained model is scored on each, the others as in the point
    eval_rows     sequences of an evaluation

    The models have equal parameters (`presets.matched`). A setting that a model does not read makes no point for it.
    """

    task: str
    models: tuple[str, ...] = presets.COMPARED
    size: str = "tiny"
    axes: tuple[Axis, ...] = ()
    state_bytes: tuple[int, ...] = ()
    train_on: tuple[Axis, ...] = ()
    eval_on: Axis = ()
    seeds: tuple[int, ...] = (0,)
    eval_rows: int = 256

    def __post_init__(self) -> None:
        known = settings_of(self.task)
        names = [name for axis in self.axes for name in (axis[0] if axis else ())]
        require_known(names, known)
        for change in (*itertools.chain(*self.train_on), *self.eval_on):
            require_known(change, [name for name, (owner, _) in known.items() if owner == "task"])
        asked = [self.eval_on] if self.eval_on else []
        axes = [(" and ".join(axis[0]) if axis else "an axis", [str(change) for change in axis])
                for axis in (*self.axes, *self.train_on, *asked)]  # fmt: skip
        for what, values in [("models", self.models), ("seeds", self.seeds), *axes]:
            if not values:
                raise ConfigError(f"the grid is empty: {what} must have at least one value, got none")
        for what, values in [("models", self.models), ("seeds", self.seeds), ("state bytes", self.state_bytes),
                             ("the settings", names), *axes]:  # fmt: skip
            if twice := [value for value in values if list(values).count(value) > 1]:
                raise ConfigError(f"{what} must differ from each other, got {twice[0]} twice; name it once")
        for model in self.models:
            if model not in presets.PRESETS:
                raise ConfigError(f"unknown model {model!r}; {nearest(model, presets.PRESETS)}")
        for what, values, least in [("eval_rows", [self.eval_rows], 1), ("seeds", self.seeds, 0),
                                    ("state bytes", self.state_bytes, 1)]:  # fmt: skip
            if min(values, default=least) < least:
                raise ConfigError(f"{what} must be at least {least}, got {min(values)}")
        if any("length" in change for change in itertools.chain(*self.train_on)):
            raise ConfigError("the batches of one training have one length; train on several with --set length=...")

    @cached_property
    def varied(self) -> list[str]:
        """The names of the settings that vary over the grid, the seed apart."""
        found = [
            name for axis in self.axes for name in axis[0] if any(change[name] != axis[0][name] for change in axis)
        ]
        return found + ["state_bytes"] * (len(self.state_bytes) > 1)

    def points(self) -> Iterator[Changes]:
        """Every combination of the axes, the state bytes and the seeds."""
        sizes = tuple({"state_bytes": size} for size in self.state_bytes) or ({},)
        seeds = ({"seed": seed} for seed in self.seeds)
        for changes in itertools.product(seeds, *self.axes, sizes):  # a whole grid of the first seed is had first
            yield {name: value for change in changes for name, value in change.items()}

    def expand(self) -> tuple[list[Trial], list[str]]:
        """The trials, each once, and what a reader of the results must know of them.

        Raises ConfigError or DataError, naming the point, for settings that can't be used; and ConfigError for an axis
        that no model reads.
        """
        trials: dict[str, Trial] = {}
        notes: dict[str, None] = {}  # in order, each once
        read: set[str] = set()
        for point, model in itertools.product(self.points(), self.models):
            try:
                trial, names = self._trial(model, point, notes)
            except BMojoError as error:
                at = named(model, {name: point[name] for name in self.varied})
                raise type(error)(f"{at}: {error}") from None
            read |= names
            if trial is not None:
                trials.setdefault(trial.id, trial)
        if not trials:
            raise ConfigError(f"the grid is empty: {'; '.join(notes)}")
        for name in [name for axis in self.axes for name in axis[0] if name not in read]:
            if name in self.varied:
                raise ConfigError(f"{name} makes no difference: no model of the sweep reads it; leave it out")
            notes[f"ignored: {name}; no model of the sweep reads it"] = None
        return list(trials.values()), list(notes)

    def _trial(self, model: str, point: Changes, notes: dict[str, None]) -> tuple[Trial | None, set[str]]:
        """The trial of a model at a point (None: its memory can't be so small), and the settings that it reads."""
        parts: dict[str, Changes] = {"task": {}, "train": {}, "model": {}}
        for name in point.keys() - {"seed", "state_bytes"}:
            parts[settings_of(self.task)[name][0]][name] = point[name]
        tasks, evaluations = self._tasks(parts["task"], point["seed"])
        changes = {**parts["model"], "vocab_size": _vocabulary(tasks, evaluations, parts["model"])}
        length = make_task(**tasks[0]).length
        settings = TrainSettings(**{**DEFAULTS, **parts["train"]}, seq_len=length, seed=point["seed"])
        config, kept = _config(model, self.size, changes)
        names = {*parts["task"], *parts["train"], *kept}
        size = point.get("state_bytes")
        if size is not None and not presets.bounded(config):
            notes[f"{model}: its state grows with the sequence, and is left as it is"] = None
        elif size is not None:
            names = names - {presets.STATE_KNOBS[model]} | {"state_bytes"}
            try:
                config = presets.at_state(model, self.size, size, **kept)
            except ConfigError as error:
                notes[f"left out: {error}"] = None
                return None, names
        varied = {name: point[name] for name in self.varied if name in names}
        about = named(model, {n: value for n, value in varied.items() if n in (*changes, "state_bytes")})
        nbytes = presets.state_bytes(config)
        if size is not None and "state_bytes" in names and nbytes < (1 - STATE_TOLERANCE) * size:
            notes[f"{about}: {nbytes:,} bytes of state, {1 - nbytes / size:.0%} below {size:,}"] = None
        shape = {name: value for name, value in changes.items() if name != "pattern"}
        count, target = parameters(config), parameters(_config("transformer", self.size, shape)[0])
        if abs(count / target - 1) > TOLERANCE:
            notes[f"{about}: {count:,} parameters, the Transformer of that size has {target:,}"] = None
        return Trial(model, config, settings, tasks, evaluations, varied), names

    def _tasks(self, fields: Changes, seed: int) -> tuple[tuple[Changes, ...], tuple[Changes, ...]]:
        """Records of the variants to train on, and of the tasks to score: first the one that is trained for."""
        last = {name: value for axis in self.train_on for name, value in axis[-1].items()}
        fields = last | fields | {"seed": seed}

        def record(changes: Changes) -> Changes:
            return task_record(make_task(self.task, **{**fields, **changes}))

        mixture = [dict(itertools.chain(*map(dict.items, v))) for v in itertools.product(*self.train_on)]
        scored = [record(changes) for changes in [{}, *mixture, *self.eval_on]]
        return tuple(map(record, mixture)), tuple(r for i, r in enumerate(scored) if r not in scored[:i])


def _vocabulary(tasks: Collection[Changes], evaluations: Collection[Changes], changes: Changes) -> int:
    """The size of the model's vocabulary: what it is trained on needs so much, or the sweep's setting if that is more.

    Raises ConfigError if an evaluation needs more.
    """
    trained = max(make_task(**record).vocab_size for record in tasks)
    size = changes.get("vocab_size", trained)
    needed = max(make_task(**record).vocab_size for record in (*tasks, *evaluations))
    if size < needed:
        raise ConfigError(
            f"vocab_size must be at least {needed}, as what is scored or trained on needs, got {size}; "
            f"use --set vocab_size={needed} (tokens that were not trained on are noise to a model), or --train-on"
        )
    return size


def _config(model: str, size: str, changes: Changes) -> tuple[ModelConfig, Changes]:
    """The model with those of the changes that it reads, and these changes.

    What would make another model of a preset is none of them, unless the pattern is given.
    """
    foreign = set() if "pattern" in changes else presets.foreign(model)
    kept = {name: value for name, value in changes.items() if name not in foreign}
    idle = presets.matched(model, size, **kept).unused
    kept = {name: value for name, value in kept.items() if name not in idle}
    return presets.matched(model, size, **kept), kept
