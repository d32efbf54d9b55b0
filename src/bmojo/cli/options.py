"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, nearest

Model = Annotated[
    str, typer.Option("--model", "--preset", help="Preset: bmojo, bmojo_f, transformer, swa, mamba2, ...")
]
Size = Annotated[str, typer.Option(help="Size of the preset: tiny, mini, 130m, 370m, 790m, 1.4b.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the model; may be repeated.")
]
Text = Annotated[str, typer.Option(help="'stdlib', a file, a folder, a glob or hf:NAME[:CONFIG].")]
Errors = Annotated[str, typer.Option(help="Bytes that are not UTF-8: 'strict' refuses them, 'replace' puts U+FFFD.")]
Seed = Annotated[int, typer.Option(min=0)]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if left out.")]
Checkpoint = Annotated[Path, typer.Argument(help="A run folder, or its model folder.")]
TokenizerSpec = Annotated[
    str | None, typer.Option("--tokenizer", help="'bytes' or a .json file; found beside the model if left out.")
]
StorePath = Annotated[
    str,
    typer.Option("--store", help="Long-term memory: a folder, postgresql://HOST/DB?store=NAME or lancedb://FOLDER."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """`["window=128", "pattern=ssm,bmojo", "num_kv_heads=none"]` to fields of ModelConfig, by their declared types."""
    types = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}
    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {pair!r}; for example --set window=128")
        if name not in types:
            raise ConfigError(f"unknown setting {name!r}; {nearest(name, types)}")
        settings[name] = parse_value(name, value, types[name])
    return settings


def parse_value(name: str, value: str, kind: str) -> Any:
    """What `value` says, as a field of the declared type `kind`; ConfigError if it doesn't."""
    kind, _, optional = kind.partition(" | ")
    if optional and value.lower() == "none":
        return None
    match kind:
        case "str":
            return value
        case "bool" if value.lower() in ("true", "false"):
            return value.lower() == "true"
        case "tuple[str, ...]":
            return tuple(part.strip() for part in value.split(","))
        case "tuple[float, float]" | "tuple[int, ...]":
            inner = kind.removeprefix("tuple[").partition(",")[0]
            return tuple(parse_value(name, part, inner) for part in value.split(",") if part.strip())
    try:
        return {"int": int, "float": float}[kind](value)
    except (KeyError, ValueError):
        names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        raise ConfigError(f"{name} must be {names[kind]}{' or none' * bool(optional)}, got {value!r}") from None


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """`"4,8,16"` as numbers."""
    return tuple(parse_value(option, part, "int") for part in text.split(",") if part.strip())


def warn_unused(config: ModelConfig, settings: dict[str, Any]) -> None:
    """Warn of settings that were given and that no layer of the model reads."""
    if ignored := sorted(config.unused & settings.keys()):
        kinds = ", ".join(sorted(set(config.kinds)))
        warnings.warn(f"ignored: {', '.join(ignored)}; no layer of this model ({kinds}) reads it", stacklevel=2)


def use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
