"""A conversion from beginning to end: find, check, map, write."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.convert import attention, bamba, bmojo_f, mamba, mamba2
from bmojo.convert.mapping import (
    ConversionError,
    Format,
    check_tensors,
    export_tensors,
    find_format,
    force_window,
    header_of,
    import_tensors,
)
from bmojo.convert.source import (
    CONFIG,
    GENERATION,
    WEIGHTS,
    companions,
    locate,
    read_settings,
    read_weights,
    token_ids,
)
from bmojo.errors import nearest
from bmojo.nn.count import parameters
from bmojo.nn.model import BMojoLM

Opened = tuple[ModelConfig, Callable[[], dict[str, Tensor]]]
OURS = "bmojo"
FORMATS: dict[str, Format] = {
    format.name: format for family in (attention, mamba, mamba2, bamba, bmojo_f) for format in family.FORMATS
}


@dataclass(frozen=True)
class Conversion:
    """What was done. `source_format` and `target_format`: a model_type each; `config`, `parameters`: of the model
    in our terms."""

    source_format: str
    target_format: str
    config: ModelConfig
    parameters: int
    dtype: str
    target: Path
    nbytes: int


def import_model(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, window: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our configuration and tensors of a model, from its config.json and its tensors.

    `window` cuts full attention to a sliding window. Raises ConversionError, which names what can't be held.
    """
    format = find_format(FORMATS, settings)
    stored = format.read_stored(settings, window)
    config = force_window(stored, window)
    check_tensors(format, stored, header_of(tensors))
    return config, import_tensors(format, stored, tensors)


def export_model(
    name: str, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reverse: config.json and tensors in the format of that name. Raises ConversionError likewise."""
    format = _named(name)
    return format.write(config), export_tensors(format, config, tensors)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    window: int | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Convert the model in `source` to a new folder `target`, which appears whole or not at all.

    source: a folder of Transformers or of `BMojoLM.save`, a run of `bmojo train`, a .gguf file, or a name on the hub.
    to: "bmojo" (the default) or a name of `FORMATS`. window: cuts full attention to a sliding window.
    dtype: of the weights that are written; None keeps the source's. Tokenizer files are taken along.
    Raises ConversionError for what can't be read or held, before anything is written.
    """
    target = Path(target)
    format = None if to in (None, OURS) else _named(str(to))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists and is not an empty folder; choose another")
    with tempfile.TemporaryDirectory() as work:
        folder = locate(source, Path(work))
        settings = read_settings(folder)
        found = settings.get("model_type", OURS)
        if found == OURS and to is None and window is None:
            raise ConversionError(
                f"{folder} is a bmojo model already; name a format to convert it to: {', '.join(FORMATS)}"
            )
        config, read = _open_ours(folder, settings, window) if found == OURS else _open_theirs(folder, settings, window)
        ends = token_ids(folder, settings)
        content = None if format is None else {**format.write(config), **ends}
        tensors = {name: _cast(name, tensor, dtype) for name, tensor in read().items()}
        with _appearing(target) as place:
            if format is None or content is None:
                _write_ours(place, config, tensors)
            else:
                _write_theirs(place, content, export_tensors(format, config, tensors))
            for path in companions(folder):
                shutil.copyfile(path, place / path.name)
            if ends and not (place / GENERATION).is_file():
                _write_json(place / GENERATION, ends)
        return Conversion(
            source_format=found,
            target_format=OURS if format is None else format.name,
            config=config,
            parameters=parameters(config),
            dtype=", ".join(sorted({_dtype_name(tensor) for tensor in tensors.values()})),
            target=target,
            nbytes=sum(path.stat().st_size for path in target.iterdir()),
        )


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In `dtype`, but for decay rates and step sizes, whose digits matter."""
    kept = dtype is None or not tensor.is_floating_point() or name.endswith(("A_log", "dt_bias"))
    return tensor if kept else tensor.to(dtype)


def _named(name: str) -> Format:
    if name not in FORMATS:
        raise ConversionError(f"unknown format {name!r}; {nearest(name, (OURS, *FORMATS))}")
    return FORMATS[name]


def _open_theirs(folder: Path, settings: dict[str, Any], window: int | None) -> Opened:
    """Configuration and headers are checked now, the weights read when the second value is called."""
    format = find_format(FORMATS, settings)
    stored = format.read_stored(settings, window)
    config = force_window(stored, window)
    weights = read_weights(folder)
    check_tensors(format, stored, weights.header)
    return config, lambda: import_tensors(format, stored, weights)


def _open_ours(folder: Path, settings: dict[str, Any], window: int | None) -> Opened:
    config = force_window(ModelConfig.from_checkpoint(settings), window)
    return config, lambda: BMojoLM.load(folder).state_dict()


def _write_ours(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        model = BMojoLM(config)
    model.load_state_dict(tensors, assign=True)
    model.save(folder)


def _write_theirs(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    _write_json(folder / CONFIG, settings | {"dtype": _dtype_name(next(iter(tensors.values())))})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends, and goes if it fails."""
    place = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield place
        place.chmod(0o755)  # mkdtemp makes folders that only the owner can read
        os.replace(place, target)
    except BaseException as error:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConversionError(f"can't write {target}: {error.strerror}; nothing was left there") from error
        raise
