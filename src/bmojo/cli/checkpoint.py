"""A trained model, its tokenizer and what it was trained on, from a run folder or a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmojo.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from bmojo.errors import CheckpointError

if TYPE_CHECKING:
    from bmojo.nn.model import BMojoLM


def open_checkpoint(path: Path, tokenizer: str | None) -> tuple[BMojoLM, Tokenizer]:
    """The model of `open_model` and the tokenizer of `open_tokenizer`."""
    model, folder = open_model(path)
    return model, open_tokenizer(model, folder, tokenizer)


def open_model(path: Path) -> tuple[BMojoLM, Path]:
    """The model, on the accelerator if there is one, and its folder. Raises CheckpointError if there is none."""
    import torch

    from bmojo.nn.model import BMojoLM

    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: expected a run folder or a model folder")
    if (path / "run.json").is_file() and not (path / "train.json").is_file():
        raise CheckpointError(f"training in {path} is not finished; run the same `bmojo train` again to go on")
    folder = path / "model" if (path / "model").is_dir() else path
    return BMojoLM.load(folder, device="cuda" if torch.cuda.is_available() else "cpu").eval(), folder


def open_tokenizer(model: BMojoLM, folder: Path, tokenizer: str | None) -> Tokenizer:
    """The tokenizer given, which must have the model's vocabulary size, or what `find_tokenizer` finds.

    Raises CheckpointError if it is missing or doesn't fit.
    """
    vocab_size = model.config.vocab_size
    if tokenizer is None:
        return find_tokenizer(folder, vocab_size)
    found = load_tokenizer(tokenizer)
    if found.vocab_size != vocab_size:
        raise CheckpointError(
            f"tokenizer {tokenizer} has {found.vocab_size} tokens, the model in {folder} {vocab_size}; "
            "name the one that the model was trained with: --tokenizer"
        )
    return found


def trained_task(folder: Path) -> dict[str, Any] | None:
    """The record of the synthetic task that the model in `folder` was trained on: task.json in the folder or beside it.

    None if there is none. Raises CheckpointError if it can't be read.
    """
    record = _beside(folder, "task.json")
    if record is not None and not isinstance(record.get("name"), str):
        raise CheckpointError(f"the task.json of {folder} names no task; expected the record of one, with its name")
    return record


def trained_length(folder: Path) -> int | None:
    """The tokens of a row that the model in `folder` was trained on: of train.json in the folder or beside it."""
    record = _beside(folder, "train.json")
    if record is None:
        return None
    settings = record.get("settings")
    length = settings.get("seq_len") if isinstance(settings, dict) else None
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(
            f"the train.json of {folder} has no seq_len of at least 1, got {length!r}; mend or delete it"
        )
    return length


def _beside(folder: Path, name: str) -> dict[str, Any] | None:
    for path in (folder / name, folder.absolute().parent / name):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} can't be read: {error}; delete it, or copy it again") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
        return content
    return None
