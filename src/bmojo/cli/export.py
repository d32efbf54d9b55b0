"""`bmojo export`: a sharded checkpoint of several processes as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A sharded checkpoint-N of Trainer with FSDP.")],
    target: Annotated[Path, typer.Argument(help="The model folder to make.")],
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or a folder with it; if it is not by the checkpoint.")
    ] = None,
) -> None:
    from bmojo.nn.count import parameters
    from bmojo.train.export import export as run

    model = run(checkpoint, target, config=config)
    print(f"{target}: model.safetensors and config.json, {parameters(model.config):,} parameters")
