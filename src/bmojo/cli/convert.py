"""`bmojo convert`: checkpoints of other families in, and the plain corners out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bmojo.convert import Conversion


def convert(
    source: Annotated[str, typer.Argument(help="A model's folder, a .gguf file, or a name on the Hugging Face hub.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="bmojo (default), llama, mistral, qwen2, qwen3, mamba2, ...")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Cut full attention to a sliding window: constant memory.")
    ] = None,
) -> None:
    from bmojo.convert import convert as run

    print(_summary(source, run(source, target, to=to, window=window)))


def _summary(source: str, done: Conversion) -> str:
    config = done.config
    window = "over the whole past" if config.window is None else f"over a window of {config.window} tokens"
    kinds = {
        "attention": f"attention layers {window}",
        "full": "attention layers over the whole past",
        "bmojo": f"bmojo layers {window}",
        "ssm": "state-space layers",
    }
    layers = " and ".join(f"{config.kinds.count(kind)} {what}" for kind, what in kinds.items() if kind in config.kinds)
    return (
        f"{source} was a {done.source_format} model; {done.target} is a {done.target_format} model: {layers}, "
        f"{config.hidden_size} wide, a vocabulary of {config.vocab_size}, {done.parameters:,} parameters in "
        f"{done.dtype}, {done.nbytes / 1e6:.1f} MB."
    )
