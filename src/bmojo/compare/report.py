"""The report of `bmojo compare`: report.html (one file, opens from disk), report.md and figures/*.png."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmojo.compare.results import validate
from bmojo.figures import Picture, draw, line_at, make_picture, new_figure, order, token_axis
from bmojo.files import optional_module, write_whole
from bmojo.tables import Cell, Column, Table, markdown, size_text, three_digits, unit_of

SPEED_NOISE = 1.1
RECALL_NOISE = 0.05
SHADES = 10

Model = dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """A metric in which a model is worse than the best model by more than noise."""

    metric: str
    text: str
    best_text: str
    best_preset: str
    factor: float

    @property
    def times(self) -> str:
        return f"{self.factor:.2f}" if math.isfinite(self.factor) else "∞"


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write report.html, report.md and figures/*.png of `results` into `folder`, each whole or not at all."""
    validate(results)
    jinja2 = optional_module("jinja2", "the report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bmojo.compare", "templates"),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    context = _context(results)
    for picture in context["pictures"].values():
        write_whole(folder / "figures" / f"{picture.name}.png", picture.png)
    for name in ("report.md", "report.html"):
        write_whole(folder / name, environment.get_template(f"{name}.j2").render(context).encode())


def summary_table(results: dict[str, Any]) -> str:
    """The tables of the text and recall suites in GitHub's markdown."""
    tables = (text_table(results), recall_table(results), recall_cost_table(results))
    return "\n\n".join(markdown(table) for table in tables if table) + "\n"


def text_table(results: dict[str, Any]) -> Table | None:
    """Size, quality, speed and memory of the models of the text suite."""
    models = _models(results, "text")
    columns = [
        _column(models, "parameters", lambda m: m["parameters"], "{:,}".format),
        _bits_column(models),
        *_cost_columns(models),
    ]
    return _table(models, columns)


def recall_table(results: dict[str, Any]) -> Table | None:
    """Recall accuracy of the models of the recall suite, a column for each length, distance and number of pairs."""
    models = _models(results, "recall")
    groups = {_group(entry): entry for model in models for entry in model["eval"]["recall"]}
    return _table(models, [_recall_column(models, groups[group]) for group in sorted(groups)])


def recall_cost_table(results: dict[str, Any]) -> Table | None:
    """Size, speed and memory of the models of the recall suite, which are smaller than those of the text suite."""
    models = _models(results, "recall")
    return _table(
        models, [_column(models, "parameters", lambda m: m["parameters"], "{:,}".format), *_cost_columns(models)]
    )


def decode_tables(results: dict[str, Any]) -> list[Table]:
    """Decode time, and state size, at every context."""
    models = _costed_models(results)
    tables = (_table(models, [make(models, c) for c in _contexts(models)]) for make in (_decode_column, _state_column))
    return [table for table in tables if table]


def losses(results: dict[str, Any]) -> dict[str, list[Loss]]:
    """For each preset, where it is worse than the best by more than noise, the greatest factor first."""
    text_models, recall_models = _models(results, "text"), _models(results, "recall")
    recall = recall_table(results)
    columns = [
        _bits_column(text_models),
        *_training_columns(text_models or recall_models),
        *(column for table in decode_tables(results) for column in table.columns),
        *(recall.columns if recall else []),
    ]
    if text_models:
        renamed = (replace(column, name=f"recall suite: {column.name}") for column in _cost_columns(recall_models))
        columns += renamed
    found: dict[str, list[Loss]] = {model["preset"]: [] for model in [*text_models, *recall_models]}
    for column in columns:
        winner = column.extreme()
        if winner is None:
            continue
        best = column.cells[winner]
        for preset, cell in column.cells.items():
            if column.loses(preset):
                small, large = sorted((cell.value, best.value))
                factor = large / small if small else math.inf
                found[preset].append(Loss(column.name, cell.text, best.text, winner, factor))
    return {preset: sorted(found[preset], key=lambda loss: -loss.factor) for preset in sorted(found, key=order)}


def _models(results: dict[str, Any], suite: str) -> list[Model]:
    """The models of a suite, in the order of STYLES, unknown presets last."""
    return sorted((m for m in results["models"] if m["suite"] == suite), key=lambda m: order(m["preset"]))


def _costed_models(results: dict[str, Any]) -> list[Model]:
    """The models whose decoding is reported: those of the text suite where it ran."""
    return _models(results, "text") or _models(results, "recall")


def _table(models: list[Model], columns: list[Column]) -> Table | None:
    return Table([m["preset"] for m in models], columns) if models and columns else None


def _column(
    models: list[Model],
    name: str,
    value: Callable[[Model], float | None],
    show: Callable[[float], str],
    *,
    head: tuple[str, ...] | None = None,
    best: Callable[..., str] | None = None,
    slack: tuple[float, float] = (SPEED_NOISE, 0.0),
) -> Column:
    """A column whose cells count as equal up to a factor and a difference, `slack`. A value of None leaves a gap."""
    factor, difference = slack
    cells = {}
    for model in models:
        if (v := value(model)) is not None:
            cells[model["preset"]] = Cell(v, show(v), v, v * factor + difference)
    return Column(name, head or (name,), cells, best)


def _bits_column(models: list[Model]) -> Column:
    cells = {}
    for model in models:
        bits, (low, high) = model["eval"]["bits_per_byte"], model["eval"]["bits_per_byte_ci95"]
        cells[model["preset"]] = Cell(bits, f"{bits:.3f} [{low:.3f}, {high:.3f}]", low, high)
    return Column("bits per byte", ("bits/byte", "[95 % CI]"), cells, min)


def _training_columns(models: list[Model]) -> list[Column]:
    speed, memory = ("training", "tokens/s"), ("peak memory", "in training")
    return [
        _column(
            models,
            "training tokens/s",
            lambda m: m["train"]["tokens_per_second"],
            "{:,.0f}".format,
            head=speed,
            best=max,
        ),
        _size_column(models, "peak memory in training", lambda m: m["train"]["peak_memory_bytes"], memory),
    ]


def _cost_columns(models: list[Model]) -> list[Column]:
    """Training, and decoding at the smallest and the largest context."""
    contexts = _contexts(models)
    ends = sorted({contexts[0], contexts[-1]}) if contexts else []
    decode = [_decode_column(models, context) for context in ends]
    return [*_training_columns(models), *decode, *(_state_column(models, context) for context in ends)]


def _size_column(
    models: list[Model], name: str, value: Callable[[Model], float | None], head: tuple[str, ...]
) -> Column:
    """A column of bytes, all in the unit of the smallest."""
    unit = unit_of(min((v for model in models if (v := value(model)) is not None), default=0))
    return _column(models, name, value, lambda size: size_text(size, unit), head=head, best=min)


def _contexts(models: Iterable[Model]) -> list[int]:
    return sorted({entry["context"] for model in models for entry in model["decode"]})


def _decoded(field: str, context: int) -> Callable[[Model], float | None]:
    return lambda model: next((e[field] for e in model["decode"] if e["context"] == context), None)


def _decode_column(models: list[Model], context: int) -> Column:
    name, head = f"decode ms/token at context {context:,}", ("decode", "ms/token", f"context {context:,}")
    return _column(models, name, _decoded("ms_per_token", context), three_digits, head=head, best=min)


def _state_column(models: list[Model], context: int) -> Column:
    name, head = f"state at context {context:,}", ("state", f"context {context:,}")
    return _size_column(models, name, _decoded("state_bytes", context), head)


def _group(entry: dict[str, Any]) -> tuple[int, int, int, str]:
    return entry["length"], entry["distance"], entry["pairs"], entry["where"]


def _recall_column(models: list[Model], group: dict[str, Any]) -> Column:
    def accuracy(model: Model) -> float | None:
        return next((e["accuracy"] for e in model["eval"]["recall"] if _group(e) == _group(group)), None)

    head = (
        f"distance {group['distance']:,}",
        f"length {group['length']:,}, {group['pairs']} pairs",
        group["where"],
        f"chance {100 * group['chance']:.1f} %",
    )
    name = f"recall at {', '.join(head[:3])}"
    return _column(models, name, accuracy, "{:.3f}".format, head=head, best=max, slack=(1.0, RECALL_NOISE))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _context(results: dict[str, Any]) -> dict[str, Any]:
    """All that the templates show."""
    text_models, recall_models = _models(results, "text"), _models(results, "recall")
    pictures = [_loss_picture(results), _position_picture(results), _recall_picture(results), _cost_picture(results)]
    return {
        "name": results["name"],
        "lead": _lead(results),
        "facts": _facts(results),
        "text_table": text_table(results),
        "recall_table": recall_table(results),
        "recall_cost_table": recall_cost_table(results),
        "decode_tables": decode_tables(results),
        "losses": losses(results),
        "pictures": {picture.name: picture for picture in pictures if picture},
        "panels": [_panel(m) for m in text_models if m.get("memory_sample")],
        "shades": range(SHADES),
        "notes": _notes(bool(text_models), bool(recall_models)),
        "markdown": markdown,
    }


def _lead(results: dict[str, Any]) -> str:
    """In plain words, what was compared."""
    suites = {suite: models for suite in ("text", "recall") if (models := _models(results, suite))}
    if not suites:
        return "No model has finished."
    presets = sorted({model["preset"] for models in suites.values() for model in models}, key=order)
    sizes = [[model["parameters"] for model in models] for models in suites.values()]
    spread = max(max(size) / min(size) - 1 if min(size) else 0.0 for size in sizes)
    tolerance = results.get("settings", {}).get("parameter_tolerance")
    allowed = f" (the run allows {_percent(tolerance)} around its target)" if tolerance is not None else ""
    seen = " and ".join(
        f"{' to '.join(f'{n:,}' for n in sorted({min(tokens), max(tokens)}))} tokens in the {suite} suite"
        for suite, models in suites.items()
        if (tokens := [model["tokens_trained"] for model in models])
    )
    return (
        f"{len(presets)} models ({', '.join(presets)}) were trained from scratch on the same batches in the same order "
        f"with the same optimiser. Their parameters are equal within {_percent(spread)}{allowed}. "
        f"Each was trained on {seen}. One training run per model, seed {results['seed']}."
    )


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Corpus, machine, settings and command, each on a line."""
    facts = []
    if corpus := results["corpus"]:
        facts.append(
            (
                "Corpus",
                f"{corpus['name']}: {size_text(corpus['bytes_train'])} in {corpus['documents_train']:,} documents to "
                f"train on, {size_text(corpus['bytes_eval'])} in {corpus['documents_eval']:,} held out; "
                f"SHA-256 {corpus['sha256'][:16]}…",
            )
        )
    machine = results["machine"]
    facts.append(
        (
            "Machine",
            f"{machine['device']}; {machine['cpu']}, {machine['threads']} threads; PyTorch {machine['torch']}",
        )
    )
    if settings := results.get("settings"):
        facts.append(("Settings", ", ".join(f"{key} {_plain(value)}" for key, value in settings.items())))
    if "command" in results:
        facts.append(("Command", results["command"]))
    version = f", bmojo {results['bmojo']}" if "bmojo" in results else ""
    facts.append(("Made", f"{results['created']}, profile {results['profile']}{version}"))
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _notes(text: bool, recall: bool) -> list[str]:
    """How each number is measured."""
    of_text = [
        "Bits per byte: negative log2 likelihood of the held-out documents over their UTF-8 bytes; lower is better. "
        "The 95 % confidence interval is over the held-out documents; it says nothing about another training seed.",
        "Bits per byte by position: the same, for tokens grouped by their position in the document. The dashed line is "
        "the training length; positions right of it were never trained on.",
    ]
    of_recall = [
        "Recall: fraction of questions whose most likely answer is the stored one. Distance is the number of tokens "
        "between a pair and its question; chance is the accuracy of guessing. The figure has one panel per sequence "
        "length and, where several numbers of pairs were tried, shows their mean."
    ]
    of_both = [
        "Loss: cross entropy in nats per predicted token on the training batches. The figure cuts off the first 5 % of "
        "the steps where they are higher than all that follows.",
        "Training tokens/s: training tokens over wall time. Peak memory: the most held while training, allocated on "
        "the accelerator or resident in the process on a CPU.",
        "Decode: median time of generating one token after reading the context, batch size 1. State: bytes carried "
        "from token to token at that context, batch size 1. Speeds depend on this machine and on how each layer is "
        "implemented; compare them within this report only.",
        "Worse by more than noise: for bits per byte, confidence intervals that don't overlap; for speed, memory and "
        f"state, more than {_percent(SPEED_NOISE - 1)}; for recall, more than {RECALL_NOISE:g} below the best.",
    ]
    return of_text * text + of_recall * recall + of_both


def _panel(model: Model) -> dict[str, Any]:
    """The sample text of a model, per layer as (token, shade, kept, innovation)."""
    sample = model["memory_sample"]
    tokens = [_visible(token) for token in sample["text"]]
    layers = []
    for layer in sample["layers"]:
        kept = set(layer["kept"])
        shades = _shades(layer["innovation"])
        layers.append(
            {
                "layer": layer["layer"],
                "kept": len(kept),
                "tokens": [
                    (token, shade, i in kept, f"{value:.3g}")
                    for i, (token, shade, value) in enumerate(zip(tokens, shades, layer["innovation"], strict=True))
                ],
            }
        )
    return {"preset": model["preset"], "layers": layers}


def _visible(token: str) -> str:
    """The token with a sign for each blank; a new line still breaks the line."""
    return token.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥").replace(" ", "·")


def _shades(values: list[float]) -> list[int]:
    """Each value's rank among all, in SHADES steps; equal values have equal shades."""
    ranked = sorted(values)
    return [bisect.bisect_left(ranked, value) * SHADES // len(ranked) for value in values]


def _loss_picture(results: dict[str, Any]) -> Picture | None:
    suites = {
        suite: models
        for suite in ("text", "recall")
        if (models := [m for m in _models(results, suite) if m["train"]["loss"]])
    }
    if not suites:
        return None
    figure, axes = new_figure(len(suites))
    for axis, (suite, models) in zip(axes, suites.items(), strict=True):
        for model in models:
            points = model["train"]["loss"]
            draw(axis, model["preset"], points, every=max(1, len(points) // 8))
        last = max(step for m in models for step, _ in m["train"]["loss"])
        settled = [value for m in models for step, value in m["train"]["loss"] if step >= 0.05 * last]
        low, high = min(settled), max(settled)
        axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axis.set(title=f"{suite} suite", xlabel="step", ylabel="training loss, nats per token")
    return make_picture(figure, axes, "loss", "Training loss by step.")


def _position_picture(results: dict[str, Any]) -> Picture | None:
    models = [m for m in _models(results, "text") if m["eval"]["by_position"]]
    if not models:
        return None
    figure, axes = new_figure()
    for model in models:
        draw(axes[0], model["preset"], model["eval"]["by_position"])
    token_axis(axes[0], "position in the document, tokens")
    axes[0].set_ylabel("bits per byte")
    if length := results.get("settings", {}).get("train_length"):
        line_at(axes[0], length, "training length")
    return make_picture(figure, axes, "by_position", "Bits per byte by position in the document.")


def _recall_picture(results: dict[str, Any]) -> Picture | None:
    models = _models(results, "recall")
    entries = [entry for model in models for entry in model["eval"]["recall"]]
    if not entries:
        return None
    beyond = {entry["length"] for entry in entries if entry["where"] == "beyond the training length"}
    lengths = sorted({entry["length"] for entry in entries})
    window = results.get("settings", {}).get("recall_window")
    figure, axes = new_figure(len(lengths), share_y=True)
    for axis, length in zip(axes, lengths, strict=True):
        here = [entry for entry in entries if entry["length"] == length]
        axis.plot(*zip(*_means(here, "chance"), strict=True), color="#555555", linestyle=":", linewidth=1.2)
        axis.annotate("chance", _means(here, "chance")[0], xytext=(0, 3), textcoords="offset points", fontsize=8)
        for model in models:
            if points := _means([e for e in model["eval"]["recall"] if e["length"] == length], "accuracy"):
                draw(axis, model["preset"], points)
        if window and min(e["distance"] for e in here) <= window <= max(e["distance"] for e in here):
            line_at(axis, window, "window")
        token_axis(axis, "distance, tokens")
        title = f"length {length:,}" + (", beyond the training length" if length in beyond else "")
        axis.set(title=title, ylabel="recall accuracy", ylim=(-0.03, 1.03))
    return make_picture(figure, axes, "recall", "Recall by distance between a pair and its question.")


def _means(entries: list[dict[str, Any]], field: str) -> list[tuple[int, float]]:
    """The mean of a field at each distance."""
    at: dict[int, list[float]] = {}
    for entry in entries:
        at.setdefault(entry["distance"], []).append(entry[field])
    return [(distance, sum(values) / len(values)) for distance, values in sorted(at.items())]


def _cost_picture(results: dict[str, Any]) -> Picture | None:
    models = [m for m in _costed_models(results) if m["decode"]]
    if not models:
        return None
    figure, axes = new_figure(2)
    scales = (("ms_per_token", "decode, ms per token", "{:g}".format), ("state_bytes", "state", size_text))
    for axis, (field, label, show) in zip(axes, scales, strict=True):
        for model in models:
            draw(axis, model["preset"], [(entry["context"], entry[field]) for entry in model["decode"]])
        token_axis(axis, "context, tokens")
        axis.set_yscale("log", base=4, subs=[])
        axis.yaxis.set_major_locator(optional_module("matplotlib.ticker", "the report").LogLocator(base=4, subs=(1, 2)))
        axis.yaxis.set_major_formatter(lambda value, _, show=show: show(value))
        axis.set_ylabel(label)
    return make_picture(figure, axes, "cost", "Cost of one generated token, and size of the state, by context.")
