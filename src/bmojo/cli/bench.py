"""`bmojo bench`: how fast ops and models are, beside other libraries', and `bmojo bench report`."""

from __future__ import annotations

import itertools
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bmojo import presets
from bmojo.cli.options import AsJson, Size, Threads, parse_settings, use_threads, whole_numbers
from bmojo.errors import ConfigError

FOLDER = Path("runs/bench")
BAR_LENGTHS, BAR_CONTEXTS, BAR_STREAM = "512,1024,2048,4096,8192", "1024,8192,131072", 1_000_000


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="stream ops layers train prefill decode memory choices; all but the last if left out."),
    ] = None,
    size: Size = "tiny",
    lengths: Annotated[str | None, typer.Option(help="Tokens of a sequence, T; several with commas.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens before those that are decoded.")] = None,
    batch: Annotated[str, typer.Option(help="Sequences of a call.")] = "1",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=V1,V2,...",
            help="Values of a setting of the models: hidden_size, window, fading_span, eidetic_slots, ... May be "
            "repeated: all combinations are measured.",
        ),
    ] = None,
    models: Annotated[str, typer.Option(help="Presets of the family, with commas.")] = ",".join(presets.PRESETS),
    stream_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the stream.")] = None,
    bars: Annotated[
        bool, typer.Option("--bars", help=f"Lengths {BAR_LENGTHS}, contexts {BAR_CONTEXTS}, a stream of a million.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of every contestant of a cell.")] = 7,
    compiled: Annotated[bool, typer.Option("--compile", help="Ours through torch.compile, too.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 on a GPU.")] = "float32",
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="The folder of the results, and to go on with.")] = FOLDER,
    as_json: AsJson = False,
) -> None:
    import torch

    from bmojo.bench.cases import CONTEXTS, SUITES, Plan
    from bmojo.bench.job import run
    from bmojo.bench.report import write_report

    use_threads(threads)
    lengths, contexts = (given or (of_bars if bars else None) for given, of_bars in
                         ((lengths, BAR_LENGTHS), (contexts, BAR_CONTEXTS)))  # fmt: skip
    plan = Plan(
        suites=tuple(suites or (name for name in SUITES if name != "choices")),
        size=size,
        lengths=None if lengths is None else _whole("--lengths", lengths),
        contexts=CONTEXTS if contexts is None else _whole("--contexts", contexts),
        batches=_whole("--batch", batch),
        changes=_changes(settings or []),
        models=tuple(part.strip() for part in models.split(",") if part.strip()),
        stream_tokens=stream_tokens or (BAR_STREAM if bars else 100_000),
        compiled=compiled,
        dtype=dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    results = run(plan, out, shlex.join(["bmojo", *sys.argv[1:]]), rounds, _tell)
    write_report(out, [results])
    _show([results], out, as_json)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `bmojo bench`, or their results.json.")],
    out: Annotated[Path | None, typer.Option(help="Where to; into the first folder if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    from bmojo.bench.job import read_results
    from bmojo.bench.report import write_report

    results = [read_results(folder) for folder in folders]
    first = folders[0] if folders[0].is_dir() else folders[0].parent
    write_report(out or first, results)
    _show(results, out or first, as_json)


def _show(results: list[dict[str, Any]], folder: Path, as_json: bool) -> None:
    import json

    from bmojo.bench.report import summary

    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))
    else:
        print(summary(results))
        print(f"in {folder}: results.json, report.md, figures/")


def _whole(option: str, text: str) -> tuple[int, ...]:
    values = whole_numbers(option, text)
    if not values or min(values) < 1:
        raise ConfigError(f"{option} must be whole numbers of at least 1, got {text!r}; for example {option} 512,2048")
    return values


def _changes(pairs: list[str]) -> tuple[dict[str, Any], ...]:
    """All combinations of the values that the settings are given."""
    axes = []
    for pair in pairs:
        name, equals, values = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE,VALUE,..., got {pair!r}; for example --set window=64,128")
        axes.append([parse_settings([f"{name}={value.strip()}"]) for value in values.split(",")])
    return tuple({name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
