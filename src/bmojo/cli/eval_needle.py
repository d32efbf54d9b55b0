"""`bmojo eval needle`: a number hidden in real text, asked for at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bmojo.cli.checkpoint import open_model, open_tokenizer, trained_length, trained_task
from bmojo.cli.options import AsJson, Checkpoint, Seed, Threads, TokenizerSpec, use_threads
from bmojo.cli.scores import TIMES, BatchSize, Rows, parse_numbers, print_left_out, print_table
from bmojo.data.tokenizers import ByteTokenizer, Tokenizer
from bmojo.errors import ConfigError, DataError
from bmojo.files import optional_module, write_whole

DEPTHS = "0,0.25,0.5,0.75,1"


def needle(
    checkpoint: Checkpoint,
    lengths: Annotated[
        str | None,
        typer.Option(help="In tokens, such as 1024,4096; 1, 2, 4, 8 and 16 times the training length if left out."),
    ] = None,
    depths: Annotated[str, typer.Option(help="Where the number is hidden, from 0, the start, to 1, the end.")] = DEPTHS,
    digits: Annotated[int | None, typer.Option(min=1, help="Of the number; 5, or as trained, if left out.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write a heat map here (.png).")] = None,
    tokenizer: TokenizerSpec = None,
    rows: Rows = 16,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    from bmojo.data.synthetic import Needle, make_task
    from bmojo.eval.needle import draw_grid, needle_grid
    from bmojo.eval.tasks import require_vocabulary

    places = _parse_depths(depths)
    if figure is not None:
        if figure.suffix.lower() != ".png":
            raise ConfigError(f"--figure takes the path of a .png, got {figure}")
        optional_module("matplotlib", "--figure")
    use_threads(threads)
    model, folder = open_model(checkpoint)
    task = trained_task(folder) if tokenizer is None else None
    base = make_task(**task) if task is not None and task["name"] == "needle" else None
    if isinstance(base, Needle):
        own: int | None = base.length
    else:
        codec = open_tokenizer(model, folder, tokenizer)
        base = Needle(text_vocab=codec.vocab_size, encode=_encoder(codec))
        own = trained_length(folder)
    if digits is not None:
        base = replace(base, digits=digits)
    require_vocabulary(model, base)
    numbers = parse_numbers("--lengths", lengths)
    if numbers is None and own is None:
        raise ConfigError(f"{checkpoint} does not say at what length it was trained; give --lengths, as 1024,4096")
    needles, left_out = [], []
    for length in numbers or [times * own for times in TIMES if own]:
        try:
            needles += [replace(base, length=length, depth=depth) for depth in places]
        except DataError as error:
            if lengths is not None:
                raise
            left_out.append({"change": {"length": length}, "reason": str(error)})
    if not needles:
        raise DataError(f"{left_out[-1]['reason']}; give --lengths")
    cells = needle_grid(model, needles, rows=rows, batch_size=batch_size, seed=seed)
    if as_json:
        how = {"digits": base.digits, "trained_at": own, "rows": rows, "seed": seed}
        print(json.dumps({"cells": cells, "left_out": left_out, **how}))
    else:
        _show(cells, base.digits, own, rows)
        print_left_out(left_out)
    if figure is not None:
        write_whole(figure, draw_grid(cells))


def _show(cells: list[dict[str, Any]], digits: int, own: int | None, rows: int) -> None:
    print(f"numbers of {digits} digits, {rows} texts a line; trained at {own or 'an unknown number of'} tokens")
    lines = []
    for cell in cells:
        low, high = cell["ci95"]
        exact = f"{cell['exact']:.3f}", f"{low:.3f} to {high:.3f}"
        lines.append([f"{cell['length']:,}", f"{cell['depth']:.0%}", *exact, f"{cell['bits']:.2f}"])
    print_table(("length", "depth", "exactly right", "95 % interval", "bits of the answer"), lines)
    print(f"a guess takes {digits * math.log2(10):.2f} bits")


def _encoder(codec: Tokenizer) -> Callable[[str], list[int]] | None:
    """What `Needle` takes; None stands for bytes."""
    return None if isinstance(codec, ByteTokenizer) else lambda text: codec.encode(text).tolist()


def _parse_depths(text: str) -> list[float]:
    try:
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        depths = []
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"--depths takes numbers from 0 to 1 with commas between them, got {text!r}")
    return depths
