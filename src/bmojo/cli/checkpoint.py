"""A trained model and its tokenizer, from a run folder or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bmojo.data.tokenizers import Tokenizer, load_tokenizer
from bmojo.errors import CheckpointError

if TYPE_CHECKING:
    from bmojo.nn.model import BMojoLM


def open_checkpoint(path: Path, tokenizer: str | None) -> tuple[BMojoLM, Tokenizer]:
    """The model, on the accelerator if there is one, and its tokenizer.

    That is the one given, or tokenizer.json in the model's folder or the one above, or bytes if the vocabulary is 256.
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
    spec = tokenizer or _beside(folder, model.config.vocab_size)
    found = load_tokenizer(spec)
    if found.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"tokenizer {spec} has {found.vocab_size} tokens, the model in {folder} {model.config.vocab_size}; "
            "use the one that the model was trained with"
        )
    return model, found


def _beside(folder: Path, vocab_size: int) -> str:
    for path in (folder / "tokenizer.json", folder.absolute().parent / "tokenizer.json"):
        if path.is_file():
            return str(path)
    if vocab_size == 256:
        return "bytes"
    raise CheckpointError(f"no tokenizer.json beside {folder}; name the model's tokenizer with --tokenizer")
