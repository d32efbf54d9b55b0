"""`bmojo info`: what a configuration costs, counted without building it."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from bmojo import presets
from bmojo.cli.options import AsJson, Model, Settings, Size, parse_settings, warn_unused
from bmojo.nn.count import Costs, costs

CONTEXTS = {"1K": 2**10, "32K": 2**15, "1M": 2**20}  # tokens
FLOPS_AT = "32K"


def info(model: Model = "bmojo", size: Size = "370m", settings: Settings = None, as_json: AsJson = False) -> None:
    changes = parse_settings(settings)
    config = presets.get(model, size, **changes)
    warn_unused(config, changes)
    layers, total = costs(config, list(CONTEXTS.values()))
    groups: dict[str, list[int]] = {}  # layers alike in kind cost the same
    for layer, kind in enumerate(config.kinds):
        groups.setdefault(kind, []).append(layer)
    if as_json:
        rows = [{"kind": kind, "layers": of, **asdict(layers[of[0]])} for kind, of in groups.items()]
        content = {"contexts": list(CONTEXTS.values()), "layers": rows, "total": asdict(total)}
        print(json.dumps({"model": model, "size": size, **content, "config": config.to_dict()}))
        return
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("layers", "kind"):
        table.add_column(name)
    for name in ("parameters", "FLOPs/token", *(f"state {name}" for name in CONTEXTS)):
        table.add_column(name, justify="right")
    for kind, of in groups.items():
        table.add_row(_ranges(of), kind, *_cells(layers[of[0]]))
    table.add_row("all", "", *_cells(total))
    print(f"{model} {size}: each layer of a kind, and all; FLOPs of a token at {FLOPS_AT}, state after so many tokens")
    Console().print(table)


def _cells(cost: Costs) -> list[str]:
    return [
        f"{cost.parameters:,}",
        _short(cost.flops[list(CONTEXTS).index(FLOPS_AT)], ("", " K", " M", " G", " T")),
        *(_short(size, (" B", " kB", " MB", " GB", " TB")) for size in cost.state_bytes),
    ]


def _short(number: float, units: tuple[str, ...]) -> str:
    """Three digits and a unit, each a thousand of the one before."""
    index = 0
    while number >= 999.5 and index < len(units) - 1:
        number, index = number / 1000, index + 1
    return f"{number:.3g}{units[index]}"


def _ranges(layers: list[int]) -> str:
    """Ascending numbers in short: "0-23", or "0,2,...,22" where they lie evenly apart."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if layers == list(range(layers[0], layers[-1] + 1, step)) and len(layers) > 3:
        return f"{layers[0]}-{layers[-1]}" if step == 1 else f"{layers[0]},{layers[1]},...,{layers[-1]}"
    return ",".join(map(str, layers))
