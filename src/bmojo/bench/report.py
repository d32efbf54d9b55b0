"""The report of `bmojo bench`: report.md and figures/*.png, of the results of one machine or several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bmojo.bench.bars import BARS, Bar, judge
from bmojo.figures import STYLES, Picture, draw, make_picture, new_figure, token_axis, write_pictures
from bmojo.files import write_whole
from bmojo.tables import Cell, Column, Table, markdown, size_text, three_digits

Results = dict[str, Any]
Found = dict[str, Any]  # a cell in the results
CONTESTS = ("ops", "layers", "train", "prefill", "decode")
AXES = ("time", "context", "tokens")
NOTES = (
    "Time: median of the rounds and, in brackets, the quartiles. Ratio: its time over that of the first of the cell, "
    "which is ours, within a round: above 1 ours is the faster.",
    "Tokens/s: tokens that a run works through over its median time. Peak memory: held in a run at most, beyond what "
    "was held before it (weights and arguments are not in it; gradients are).",
    "Share of the floor: the time that the counted work takes at the rates which the machine reached in the same run, "
    "over the time that it took. Counted are the FLOPs of the matrix products and, once, the bytes of weights, of each "
    "layer's input and output and of the logits (of an op: of arguments and results); three times that with the "
    "backward pass. A decoded token reads the weights and the state.",
    "Timings depend on the machine and on what else ran on it (its load when a cell began is in results.json): "
    "compare within a cell.",
)


def write_report(folder: Path, runs: Sequence[Results]) -> None:
    """Write report.md and figures/*.png into `folder`, each whole or not at all, and delete older figures."""
    pictures = list(_pictures(runs))
    write_pictures(folder / "figures", pictures)
    write_whole(folder / "report.md", _text(runs, pictures).encode())


def summary(runs: Sequence[Results]) -> str:
    """The bars, and where ours loses."""
    return "\n".join([*_bars(runs), "", "Where ours loses:", "", *_losses(runs)])


def _text(runs: Sequence[Results], pictures: Sequence[Picture]) -> str:
    lines = ["# bmojo bench", ""]
    for results in runs:
        machine, rates = results["machine"], [cell["rates"] for cell in results["cells"]]
        beside = ", ".join(f"{name} {version or 'not installed'}" for name, version in results["packages"].items())
        lines += [
            f"- Machine: {machine['device']}; {machine['cpu']}, {machine['threads']} threads of {machine['cores']} "
            f"cores; PyTorch {machine['torch']}",
            f"- Beside: {beside}",
            f"- Made: {results['created']}, bmojo {results['bmojo']}; {len(results['cells'])} cells; last by "
            f"`{results['command']}`",
        ]
        if rates:
            flops, bytes_ = (sorted(rate[name] for rate in rates)[len(rates) // 2] for name in ("flops", "bytes"))
            lines.append(f"- Rates: {flops / 1e9:,.0f} GFLOP/s in a matrix product, {bytes_ / 1e9:.1f} GB/s in a copy")
    lines += ["", "## The bars", "", *_bars(runs), "", "## Where ours loses", "", *_losses(runs)]
    for picture in pictures:
        lines += ["", f"![{picture.caption}](figures/{picture.name}.png)"]
    for results in runs:
        for title, cells in _groups(results).items():
            of = f" ({results['machine']['device']})" if len(runs) > 1 else ""
            lines += ["", f"## {title}{of}", "", markdown(_table(cells)), *_absent(cells)]
    lines += ["", "## How to read it", "", *(f"- {note}" for note in NOTES)]
    return "\n".join(lines) + "\n"


# the bars, and the losses
def _bars(runs: Sequence[Results]) -> list[str]:
    lines = ["| bar | at | bound | measured | |", "| --- | --- | ---: | ---: | --- |"]
    for bar in BARS:
        verdict = judge(bar, runs)
        sign, at = "≥" if bar.at_least else "≤", ", ".join(f"{x:,}" for x in bar.at)
        got = "–" if verdict.measured is None else f"{_shown(bar, verdict.measured)} {verdict.where}".strip()
        lines.append(f"| {bar.what} | {bar.axis} {at} | {sign} {_shown(bar, bar.bound)} | {got} | {verdict.word} |")
    return lines


def _shown(bar: Bar, value: float) -> str:
    return f"{value:.2f}" if bar.names else f"{value / 1e6:.1f} MB"


def _losses(runs: Sequence[Results]) -> list[str]:
    """Where another library is faster than ours, or another preset than `bmojo`; the worst first."""
    lost: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for results in runs:
        for title, cells in _groups(results).items():
            for cell, entry in ((one, entry) for one in cells for entry in one.get("entries", ())):
                against = entry["rival"] or cell["case"] == "family"
                if against and (ratio := entry.get("ratio")) and ratio["median"] < 1:
                    lost[title, entry["name"]].append((_axis(cell), ratio))
    lines = []
    for (title, name), found in sorted(lost.items(), key=lambda item: min(ratio["median"] for _, ratio in item[1])):
        ratios = ", ".join(f"{_spread(ratio)} at {axis} {x:,}" for (axis, x), ratio in found)
        noise = "" if any(ratio["high_quartile"] < 1 for _, ratio in found) else " (within the noise)"
        lines.append(f"- {title}: {name} takes {ratios} of our time{noise}")
    return lines or ["Nowhere that was measured."]


# the tables
def _axis(cell: Found) -> tuple[str, int]:
    """The setting that stands on the x axis of figures, and its value."""
    settings = cell["settings"]
    name = next(name for name in AXES if name in settings)
    return name, settings.get("longer", settings[name])


def _title(cell: Found) -> str:
    settings = cell["settings"]
    parts = [settings["pass"], settings["size"]]
    parts += [f"batch {settings['batch']}"] * (settings["batch"] > 1)
    parts += [settings["dtype"]] * (settings["dtype"] != "float32")
    parts += ["compiled too"] * ("compiled" in settings)
    if "models" in settings:
        parts.append(f"of {', '.join(settings['models'])}")
    parts += [f"{name} {value}" for name, value in settings["set"].items()]
    return f"{cell['suite']}: {cell['case']}, {', '.join(parts)}"


def _groups(results: Results) -> dict[str, list[Found]]:
    """The cells by all but their x axis, in its order."""
    groups: dict[str, list[Found]] = defaultdict(list)
    for cell in results["cells"]:
        groups[_title(cell)].append(cell)
    return {title: sorted(cells, key=lambda cell: _axis(cell)[1]) for title, cells in groups.items()}


def _table(cells: Sequence[Found]) -> Table:
    """A row for each contestant of each cell."""
    rows = {f"{_axis(cell)[1]:,}: {entry['name']}": entry for cell in cells for entry in _entries(cell)}

    def column(head: tuple[str, ...], show: Callable[[Found], str | None]) -> Column | None:
        shown = {row: Cell(0, text, 0, 0) for row, entry in rows.items() if (text := show(entry)) is not None}
        return Column(head[0], head, shown, None) if shown else None

    def size(name: str) -> Callable[[Found], str | None]:
        return lambda entry: None if entry.get(name) is None else size_text(entry[name])

    columns = (
        column(("time, ms", "[quartiles]"), lambda e: _spread(e.get("seconds"), 1000)),
        column(("ratio", "[quartiles]"), lambda e: _spread(e.get("ratio"))),
        column(("tokens/s",), lambda e: f"{e['tokens_per_second']:,.0f}"),
        column(("share of", "the floor"), lambda e: f"{100 * e['floor_share']:.3g} %" if "floor_share" in e else None),
        column(("peak memory",), size("peak_memory_bytes")),
        column(("state",), size("state_bytes")),
        column(("growth",), size("growth_bytes")),
        column(("parameters",), lambda e: f"{e['parameters']:,}" if "parameters" in e else None),
        column(("compiling, s",), lambda e: f"{e['compile_seconds']:.0f}" if "compile_seconds" in e else None),
    )
    return Table(list(rows), [column for column in columns if column])


def _entries(cell: Found) -> list[Found]:
    return [{"name": cell["case"], **cell["stream"]}] if "stream" in cell else cell["entries"]


def _spread(values: dict[str, float] | None, factor: float = 1) -> str | None:
    if values is None:
        return None
    median, low, high = (three_digits(factor * values[name]) for name in ("median", "low_quartile", "high_quartile"))
    return f"{median} [{low}, {high}]"


def _absent(cells: Iterable[Found]) -> list[str]:
    """Who did not run, and why; a line for each reason."""
    reasons = {f"- {name}: {why}": None for cell in cells for name, why in cell.get("absent", {}).items()}
    return ["", "Not measured:", "", *reasons] if reasons else []


# the figures
Lines = dict[str, list[tuple[float, float]]]


def _pictures(runs: Sequence[Results]) -> Iterator[Picture]:
    for number, results in enumerate(runs):
        suffix = f"_{number + 1}" if len(runs) > 1 else ""
        on = f", {results['machine']['device']}" if len(runs) > 1 else ""
        for name, caption, x, y, panels, kind in (
            ("speed", "Tokens a second by length", "tokens", "tokens/s", _panels(results, _speed), "log"),
            ("ratios", "Time of other libraries over ours: above the line ours is faster", "tokens", "ratio",
             _panels(results, _ratio), "ratio"),
            ("decode", "Time of a decoded token by context", "context, tokens", "ms per token",
             _panels(results, _token_ms), "log"),
            ("floor", "Share of the floor, ours", "tokens", "share, %", _panels(results, _share), "zero"),
            ("memory", "Peak memory in training by length", "tokens", "MiB", _panels(results, _memory), "log"),
            ("stream", "Memory of the process over a stream", "tokens read", "MiB", _stream(results), "plain"),
        ):  # fmt: skip
            if panels:
                yield _picture(name + suffix, caption + on, x, y, panels, kind)


def _panels(results: Results, points: Callable[[Found], Iterator[tuple[str, str, float]]]) -> dict[str, Lines]:
    """Panels of lines; `points` gives the panel, the line and the height of each point of a cell."""
    panels: dict[str, Lines] = defaultdict(lambda: defaultdict(list))
    for cells in _groups(results).values():
        for cell in cells:
            for panel, line, y in points(cell):
                panels[panel][line].append((_axis(cell)[1], y))
    return panels


def _speed(cell: Found) -> Iterator[tuple[str, str, float]]:
    if cell["suite"] in ("train", "prefill") and cell["case"] == "family":
        for entry in cell["entries"]:
            yield _title(cell), entry["name"], entry["tokens_per_second"]


def _ratio(cell: Found) -> Iterator[tuple[str, str, float]]:
    if cell["suite"] in CONTESTS and cell["case"] != "growth":
        for entry in cell["entries"]:
            if entry["rival"] and "ratio" in entry:
                yield _title(cell), entry["name"], entry["ratio"]["median"]


def _token_ms(cell: Found) -> Iterator[tuple[str, str, float]]:
    if cell["suite"] == "decode" and cell["case"] == "family":
        for entry in cell["entries"]:
            yield _title(cell), entry["name"], 1000 / entry["tokens_per_second"] * cell["settings"]["batch"]


def _share(cell: Found) -> Iterator[tuple[str, str, float]]:
    if cell["suite"] in CONTESTS and cell["case"] != "growth":
        panel = f"{cell['suite']}, {_title(cell).partition(', ')[2]}"
        ours = [entry for entry in cell["entries"] if not entry["rival"] and "floor_share" in entry]
        if cell["case"] == "family":
            yield from ((panel, entry["name"], 100 * entry["floor_share"]) for entry in ours)
        elif cell["suite"] in ("ops", "layers"):
            yield from ((panel, cell["case"], 100 * entry["floor_share"]) for entry in ours[:1])


def _memory(cell: Found) -> Iterator[tuple[str, str, float]]:
    if cell["suite"] == "memory":
        for entry in cell["entries"]:
            if entry["peak_memory_bytes"]:
                yield _title(cell), entry["name"], entry["peak_memory_bytes"] / 2**20


def _stream(results: Results) -> dict[str, Lines]:
    return {
        _title(cell): {cell["case"]: [(read, held / 2**20) for read, held in cell["stream"]["samples"]]}
        for cell in results["cells"]
        if "stream" in cell
    }


def _picture(name: str, caption: str, x: str, y: str, panels: dict[str, Lines], kind: str) -> Picture:
    figure, axes = new_figure(len(panels))
    others = [line for line in dict.fromkeys(line for lines in panels.values() for line in lines)]
    others = [line for line in others if line.partition(",")[0] not in STYLES]
    spare = dict(zip(others, (list(STYLES.values()) * len(others)), strict=False))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for line, points in lines.items():
            colour, marker = spare.get(line) or STYLES[line.partition(",")[0]]
            stroke = "--" if "," in line else "-"
            draw(axis, line, sorted(points), color=colour, marker=marker if len(points) < 20 else "", linestyle=stroke)
        if kind != "plain":
            token_axis(axis, x)
        else:
            axis.set_xlabel(x)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if kind == "log":
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(lambda value, _: three_digits(value))
        else:
            axis.set_ylim(0, 1.1 * max(y for points in lines.values() for _, y in points))
        if kind == "ratio":
            axis.axhline(1, color="#555555", linestyle=":", linewidth=1.2)
        axis.set_ylabel(y)
        axis.set_title(title, fontsize=9)
    return make_picture(figure, axes, name, caption)
