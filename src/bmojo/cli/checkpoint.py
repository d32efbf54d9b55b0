"""A trained model and its tokenizer, from a run folder or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bmojo.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from bmojo.errors import CheckpointError

if TYPE_CHECKING:
    from bmojo.nn.model import BMojoLM


def open_checkpoint(path: Path, tokenizer: str | None) -> tuple[BMojoLM, Tokenizer]:
    """The model, on the accelerator if there is one, and its tokenizer.

    That is the one given, which must have the model's vocabulary size, or what `find_tokenizer` finds.
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
    if tokenizer is None:
        return model, find_tokenizer(folder, vocab_size)
    found = load_tokenizer(tokenizer)
    if found.vocab_size != vocab_size:
        raise CheckpointError(
            f"tokenizer {tokenizer} has {found.vocab_size} tokens, the model in {folder} {vocab_size}; "
            "name the one that the model was trained with: --tokenizer"
        )
    return model, found
