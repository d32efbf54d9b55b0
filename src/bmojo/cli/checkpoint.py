"""A trained model and its tokenizer, from a run folder or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bmojo.data.tokenizers import Tokenizer, load_tokenizer
from bmojo.errors import CheckpointError

if TYPE_CHECKING:
    from bmojo.nn.model import BMojoLM

TOKENIZER = "tokenizer.json"
LEVELS = 3  # runs/compare/NAME/tokenizer.json is that of runs/compare/NAME/text/PRESET/model


def open_checkpoint(path: Path, tokenizer: str | None) -> tuple[BMojoLM, Tokenizer]:
    """The model, on the accelerator if there is one, and its tokenizer.

    That is the one given, or the nearest tokenizer.json of the model's vocabulary size in its folder or up to LEVELS
    above it, or bytes if that size is 256. One in the model's own folder may have fewer ids: vocabularies are padded.
    Raises CheckpointError if something is missing or doesn't fit.
    """
    import torch

    from bmojo.nn.model import BMojoLM

    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: expected a run folder or a model folder")
    if (path / "run.json").is_file() and not (path / "train.json").is_file():
        raise CheckpointError(f"training in {path} is not finished; run the same `bmojo train` again to go on")
    folder = path / "model" if (path / "model").is_dir() else path
    model = BMojoLM.load(folder, device="cuda" if torch.cuda.is_available() else "cpu").eval()
    vocab_size = model.config.vocab_size
    specs = [tokenizer] if tokenizer else _beside(folder, vocab_size)
    for spec in specs:
        found = load_tokenizer(spec)
        padded = spec == str(folder.absolute() / TOKENIZER) and found.vocab_size < vocab_size
        if found.vocab_size == vocab_size or padded:
            return model, found
    raise CheckpointError(
        f"tokenizer {specs[0]} has {load_tokenizer(specs[0]).vocab_size} tokens, the model in {folder} {vocab_size}; "
        "name the one that the model was trained with: --tokenizer"
    )


def _beside(folder: Path, vocab_size: int) -> list[str]:
    """The tokenizers that may be the model's, nearest first: at least one."""
    folder = folder.absolute()
    paths = [place / TOKENIZER for place in (folder, *folder.parents[:LEVELS])]
    specs = [str(path) for path in paths if path.is_file()] + ["bytes"] * (vocab_size == 256)
    if not specs:
        raise CheckpointError(f"no {TOKENIZER} beside {folder}; name the model's tokenizer with --tokenizer")
    return specs
