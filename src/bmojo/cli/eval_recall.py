"""`bmojo eval recall`: key-value pairs that a model was shown, asked later."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bmojo.cli.checkpoint import open_model, trained_task
from bmojo.cli.options import AsJson, Checkpoint, Seed, Threads, use_threads
from bmojo.cli.scores import OTHER, TIMES, TRAINED, BatchSize, Rows, Scores, parse_numbers
from bmojo.errors import ConfigError

FILLERS = ("constant", "alphabet", "text", "noise")


def recall(
    checkpoint: Checkpoint,
    pairs: Annotated[
        str | None, typer.Option(help="Numbers of pairs, such as 4,8,16; half, twice and 4 times the own if left out.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths in tokens, such as 256,1024; up to 16 times the own if left out.")
    ] = None,
    filler: Annotated[
        str | None, typer.Option(help="What stands between, such as constant,noise; every kind that fits if left out.")
    ] = None,
    rows: Rows = 64,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    from bmojo.data.synthetic import MQAR

    use_threads(threads)
    model, folder = open_model(checkpoint)
    trained_on = trained_task(folder)
    known = trained_on is not None and trained_on.get("name") == "mqar"
    base = trained_on if trained_on is not None and known else _that_fits(model.config.vocab_size)
    scores = Scores(model, base, rows=rows, batch_size=batch_size, seed=seed)
    own = scores.own
    assert isinstance(own, MQAR)
    numbers = parse_numbers("--pairs", pairs) or [own.pairs // 2 or 1, 2 * own.pairs, 4 * own.pairs]
    scores.add(({"pairs": number} for number in numbers), required=pairs is not None)
    spans = parse_numbers("--lengths", lengths) or [times * own.length for times in TIMES]
    scores.add(({"length": span} for span in spans), required=lengths is not None)
    kinds = FILLERS if filler is None else [kind.strip() for kind in filler.split(",")]
    scores.add(({"filler": kind} for kind in kinds), required=filler is not None)
    where = TRAINED if known else OTHER
    scores.show(where, trained_on, as_json)


def _that_fits(vocab_size: int) -> dict[str, Any]:
    """Settings for a model that was trained on something else."""
    each = min(128, (vocab_size - 1) // 2)
    if each < 2:
        raise ConfigError(f"recall needs a vocabulary of at least 5 tokens, the model has {vocab_size}")
    return {"name": "mqar", "length": 128, "pairs": min(8, each), "keys": each, "values": each}
