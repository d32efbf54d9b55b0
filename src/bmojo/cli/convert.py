"""`bmojo convert`: checkpoints of other families in, and the plain corners out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bmojo.convert import Conversion

_KINDS = {"attention": "attention", "ssm": "state-space", "bmojo": "bmojo"}


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
    counts = {kind: config.kinds.count(kind) for kind in _KINDS if kind in config.kinds}
    layers = " and ".join(f"{count} {_KINDS[kind]}" for kind, count in counts.items())
    sight = "the whole past" if config.window is None else f"a window of {config.window} tokens"
    attends = "" if set(config.kinds) == {"ssm"} else f" over {sight}"
    return (
        f"{source} was a {done.source_format} model; {done.target} is a {done.target_format} model: {layers} layers"
        f"{attends}, {config.hidden_size} wide, a vocabulary of {config.vocab_size}, {done.parameters:,} parameters in "
        f"{done.dtype}, {done.nbytes / 1e6:.1f} MB."
    )
