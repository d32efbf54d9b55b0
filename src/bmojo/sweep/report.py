"""The report of a sweep: table.md, and figures/*.png of accuracy by whatever varies.

Points are means over the seeds. Of training settings that vary (the learning rate, say) a figure shows the best.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bmojo.figures import STYLES, Picture, draw, make_picture, new_figure, order, write_pictures
from bmojo.files import write_whole
from bmojo.sweep.grid import named, settings_of, shown
from bmojo.tables import Cell, Column, Table, markdown, size_text

Result = dict[str, Any]  # a trial in results.json
Key = tuple[tuple[str, Any], ...]  # some settings and their values

# of Student's distribution, at 1, 2, ... degrees of freedom: half the width of a 95 % interval in standard errors
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LINES = ("-", "--", ":", "-.")


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write table.md and figures/*.png into `folder`, each whole or not at all, and delete figures of an older grid."""
    pictures = list(_pictures(results))
    write_pictures(folder / "figures", pictures)
    write_whole(folder / "table.md", _text(results, pictures).encode())


def _text(results: dict[str, Any], pictures: list[Picture]) -> str:
    machine = results["machine"]
    settings = ", ".join(f"{name} {shown(value)}" for name, value in results["fixed"].items())
    lines = [
        f"# {results['name']}: {results['task']}",
        "",
        f"- Settings: {settings or 'as they are'}; size {results['size']}; seeds {shown(results['seeds'])}",
        f"- Machine: {machine['device']}; {machine['cpu']}, {machine['threads']} threads; PyTorch {machine['torch']}",
        f"- Command: `{results['command']}`",
        f"- Made: {results['created']}, bmojo {results['bmojo']}; {len(results['trials'])} trials",
        *(f"- {note}" for note in results["notes"]),
        "",
        "Accuracy: the share of questions whose most likely answer is the right one; mean and 95 % interval over the "
        "seeds (of one seed: over the questions). Of training settings that vary, the best is shown. Best of each "
        "column in **bold**, worst marked ▼ if the intervals don't overlap. Facts kept: the share of the tokens that "
        "hold facts in each layer's eidetic slots at the end. Figures: dotted lines show chance, shades reach from the "
        "worst to the best seed.",
    ]
    for where, trials in _by_task(results).items():
        chance = trials[0]["evaluations"][0]["chance"]
        title = ", ".join(f"{name} {shown(value)}" for name, value in where) or "All trials"
        lines += ["", f"## {title} (chance {chance:.3g})", "", markdown(_table(results, trials))]
    for picture in pictures:
        lines += ["", f"![{picture.caption}](figures/{picture.name}.png)"]
    failed = [trial for trial in results["trials"] if "failed" in trial]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {named(t['model'], t['varied'])}, seed {t['seed']}: {t['failed']}" for t in failed]
    return "\n".join(lines) + "\n"


def _succeeded(results: dict[str, Any]) -> list[Result]:
    return [trial for trial in results["trials"] if "failed" not in trial]


def _owner(results: dict[str, Any]) -> Callable[[str], str]:
    known = settings_of(results["task"])
    return lambda name: known[name][0] if name in known else "model"  # state_bytes


def _by_task(results: dict[str, Any]) -> dict[Key, list[Result]]:
    """The trials by the settings of the task that vary: accuracies can be compared within each."""
    owner = _owner(results)
    groups: dict[Key, list[Result]] = defaultdict(list)
    for trial in _succeeded(results):
        groups[tuple((n, v) for n, v in _frozen(trial["varied"]) if owner(n) == "task")].append(trial)
    return groups


# the table
def _table(results: dict[str, Any], trials: list[Result]) -> Table:
    """A row for each model and its settings, with the best of the settings of training that vary."""
    owner = _owner(results)
    tried: dict[str, dict[Key, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for trial in sorted(trials, key=lambda trial: order(trial["model"])):
        varied = _frozen(trial["varied"])
        row = named(trial["model"], {n: v for n, v in varied if owner(n) == "model"})
        tried[row][tuple((n, v) for n, v in varied if owner(n) == "train")].append(trial)
    best = {row: max(of.items(), key=lambda item: _mean(list(map(_base, item[1])))) for row, of in tried.items()}
    rows = {row: seeds for row, (_, seeds) in best.items()}

    def column(head: tuple[str, ...], show: Callable[[str], str]) -> Column:
        return Column(head[0], head, {row: Cell(0, show(row), 0, 0) for row in rows}, None)

    columns = [
        column(("parameters",), lambda row: f"{rows[row][0]['parameters']:,}"),
        column(("state",), lambda row: size_text(rows[row][0]["state_bytes"])),
    ]
    for i, score in enumerate(trials[0]["evaluations"]):
        head = ("accuracy", *(f"{name} {shown(value)}" for name, value in _changes(score, trials[0])))
        cells = {row: _accuracy([seed["evaluations"][i] for seed in seeds]) for row, seeds in rows.items()}
        columns.append(Column(f"accuracy {i}", head, cells, max))
    for name in results["varied"]:
        if owner(name) == "train":
            shows = {row: shown(dict(settings)[name]) for row, (settings, _) in best.items()}
            columns.append(column(("best", name), shows.__getitem__))
    columns.append(column(("training", "tokens/s"), lambda row: _speed(rows[row])))
    if any(trial["facts_kept"] for trial in trials):
        columns.append(column(("facts kept",), lambda row: _facts_kept(rows[row])))
    if len(results["seeds"]) > 1:
        columns.append(column(("seeds",), lambda row: str(len(rows[row]))))
    return Table(list(rows), columns)


def _frozen(varied: dict[str, Any]) -> Key:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in varied.items())


def _changes(score: dict[str, Any], trial: Result) -> Key:
    """What an evaluation asks differently from the task that the trial is for."""
    base = trial["evaluations"][0]["task"]
    return tuple((name, value) for name, value in score["task"].items() if value != base[name])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _accuracy(scores: list[dict[str, Any]]) -> Cell:
    values = [score["accuracy"] for score in scores]
    mean, n = _mean(values), len(values)
    if n == 1:
        low, high = scores[0]["ci95"]
    else:
        error = (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
        half = error * (T95[n - 2] if n - 2 < len(T95) else 2.2)
        low, high = mean - half, mean + half
    return Cell(mean, f"{mean:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]", low, high)


def _speed(seeds: list[Result]) -> str:
    return f"{_mean([seed['train']['tokens_per_second'] for seed in seeds]):,.0f}"


def _facts_kept(seeds: list[Result]) -> str:
    if not seeds[0]["facts_kept"]:
        return "–"
    layers = zip(*(seed["facts_kept"] for seed in seeds), strict=True)
    return ", ".join(f"{_mean(list(layer)):.2f}" for layer in layers)


# the figures
class Observation(NamedTuple):
    """A trial at a place of the x axis. Of several settings the one of most `merit` is shown."""

    trial: Result
    x: Any
    accuracy: float
    merit: float


def _pictures(results: dict[str, Any]) -> Iterator[Picture]:
    trials = _succeeded(results)
    if not trials:
        return
    if len({trial["state_bytes"] for trial in trials}) > 1:
        yield _picture(results, "state_bytes", [_observe(t, t["state_bytes"]) for t in trials])
    by_distance = [
        Observation(trial, (low * high) ** 0.5, accuracy, _base(trial))
        for trial in trials
        for low, high, accuracy, _ in trial["evaluations"][0]["by_distance"]
    ]
    if len({seen.x for seen in by_distance}) > 1:
        yield _picture(results, "distance", by_distance)
    asked = {tuple(dict(_changes(score, trial))) for trial in trials for score in trial["evaluations"]} - {()}
    for names in sorted(asked):  # what changes together is shown by its first setting
        yield _picture(
            results,
            names[0],
            [
                Observation(trial, score["task"][names[0]], score["accuracy"], _base(trial))
                for trial in trials
                for score in trial["evaluations"]
                if tuple(dict(_changes(score, trial))) in ((), names)
            ],
            suffix="".join(f"_and_{name}" for name in names[1:]) + "_asked",
        )
    for name in results["varied"]:
        if name != "state_bytes":
            yield _picture(results, name, [_observe(t, t["varied"].get(name)) for t in trials])


def _base(trial: Result) -> float:
    return trial["evaluations"][0]["accuracy"]


def _observe(trial: Result, x: Any) -> Observation:
    return Observation(trial, tuple(x) if isinstance(x, list) else x, _base(trial), _base(trial))


Seeds = list[float]  # accuracies
Panels = dict[Key, dict[tuple[str, Key], dict[Any, Seeds]]]


def _panels(results: dict[str, Any], name: str, seen: list[Observation], asked: bool) -> Panels:
    """A panel for each task, in it a line for each model and its settings, and at each x the seeds of the best of the
    settings that make no line: those of training, and numbers where the figure is of something that they bring about.
    What x is has no part in that, unless it is `asked` of models that were trained with a value of their own.
    """
    owner = _owner(results)
    effect = name in ("state_bytes", "distance")

    def part(observation: Observation, wanted: str) -> Key:
        def place(setting: str, value: Any) -> str:
            if owner(setting) == "task":
                return "panel"
            text = isinstance(value, str | tuple | bool)
            return "line" if owner(setting) == "model" and (text or not effect) else "rest"

        varied = _frozen(observation.trial["varied"])
        return tuple((n, v) for n, v in varied if place(n, v) == wanted and (asked or n != name))

    groups: dict[Any, dict[Key, list[Observation]]] = defaultdict(lambda: defaultdict(list))
    for one in seen:
        line = (one.trial["model"], part(one, "line"))
        groups[part(one, "panel"), line, one.x][part(one, "rest")].append(one)
    panels: Panels = defaultdict(lambda: defaultdict(dict))
    for (panel, line, x), settings in groups.items():
        best = max(settings.values(), key=lambda seeds: _mean([seed.merit for seed in seeds]))
        panels[panel][line][x] = [seed.accuracy for seed in best]
    return panels


def _picture(results: dict[str, Any], name: str, seen: list[Observation], suffix: str = "") -> Picture:
    panels = _panels(results, name, seen, asked=bool(suffix))
    labels = sorted({line: None for lines in panels.values() for line in lines}, key=lambda line: order(line[0]))
    styles = _styles(labels)
    figure, axes = new_figure(len(panels), share_y=True)
    values = sorted({one.x for one in seen if one.x is not None}, key=lambda x: (isinstance(x, str), x))
    for axis, (panel, lines) in zip(axes, panels.items(), strict=True):
        place = _axis(axis, values, name)
        for line in (label for label in labels if label in lines):
            points = {x: lines[line][x] for x in values if x in lines[line]}
            if not points:  # it doesn't read the setting: the same everywhere
                points = {x: lines[line][None] for x in (values[0], values[-1])}
            at, seeds = [place(x) for x in points], list(points.values())
            draw(
                axis,
                line[0],
                zip(at, map(_mean, seeds), strict=True),
                label=named(line[0], dict(line[1])),
                **styles[line],
            )
            spread = list(map(min, seeds)), list(map(max, seeds))
            axis.fill_between(at, *spread, color=axis.lines[-1].get_color(), alpha=0.15, linewidth=0)
        axis.axhline(_chance(results, panel), color="#555555", linestyle=":", linewidth=1.2)
        axis.set(ylabel="accuracy", ylim=(-0.03, 1.03), title=", ".join(f"{n} {shown(v)}" for n, v in panel))
    what = {"state_bytes": "state bytes", "distance": "the distance of a question from its fact"}.get(name, name)
    what += suffix.removesuffix("_asked").replace("_", " ")
    caption = f"Accuracy by {what}{', asked of the trained models' * bool(suffix)}"
    return make_picture(figure, axes, f"by_{name}{suffix}", caption)


def _chance(results: dict[str, Any], task: Key) -> float:
    """Of the trials at these settings."""
    of = (trial for trial in _succeeded(results) if set(task) <= set(_frozen(trial["varied"])))
    return next(of)["evaluations"][0]["chance"]


def _styles(labels: list[tuple[str, Key]]) -> dict[tuple[str, Key], dict[str, Any]]:
    """The colour of the preset; its lines differ in strokes and marks, or, where there is but one preset, in colour."""
    if len({model for model, _ in labels}) == 1:
        looks = itertools.cycle({"color": colour, "marker": marker} for colour, marker in reversed(STYLES.values()))
        return dict(zip(labels, looks, strict=False))
    count: dict[str, int] = defaultdict(int)
    styles = {}
    for label in labels:
        hollow, stroke = divmod(count[label[0]], len(LINES))
        styles[label] = {"linestyle": LINES[stroke], "fillstyle": ("full", "none")[hollow % 2]}
        count[label[0]] += 1
    return styles


def _axis(axis: Any, values: list[Any], name: str) -> Callable[[Any], float]:
    """Make the x axis; returns where on it a value stands. Numbers are spaced by their logarithms, words evenly."""
    axis.set_xlabel({"state_bytes": "state of a sequence", "distance": "distance, tokens"}.get(name, name))
    if (
        all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
        and values[0] >= 0
        and values[-1] > 0
    ):
        ticks = [x for x in values if x > 0]
        if values[0] == 0:
            axis.set_xscale("symlog", base=2, linthresh=ticks[0])
        else:
            axis.set_xscale("log", base=2)
        if name == "state_bytes":
            axis.xaxis.set_major_formatter(lambda value, _: size_text(value))
        elif name == "distance" or len(values) > 8:
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        else:
            axis.set_xticks(values, [f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in values], minor=False)
            axis.set_xticks([], minor=True)
        return float
    axis.set_xticks(range(len(values)), [shown(x) for x in values])
    return lambda x: float(values.index(x))
