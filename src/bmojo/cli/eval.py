"""`bmojo eval`: how well a trained model predicts text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmojo.cli.checkpoint import open_checkpoint
from bmojo.cli.options import AsJson, Checkpoint, Errors, Seed, Threads, TokenizerSpec, use_threads
from bmojo.data import TextData, read_documents
from bmojo.data.tokenizers import Tokenizer
from bmojo.errors import DataError

if TYPE_CHECKING:
    from bmojo.eval import Documents

LONG_DOCUMENTS = 16  # read for the scores by position
FIRST_POSITION, LAST_POSITION = 64, 65536


def eval(
    checkpoint: Checkpoint,
    text: Annotated[
        str | None,
        typer.Option(
            help="'stdlib', a file, a folder, a glob or hf:NAME[:CONFIG]; the run's held-out text if left out."
        ),
    ] = None,
    tokenizer: TokenizerSpec = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            help="Score at most so many bytes, at most an eighth of them of one document; "
            "all of the text is read all the same, and the scores by position are not bounded."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Empty the state after every so many tokens of a document; never if left out."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    errors: Errors = "strict",
    as_json: AsJson = False,
) -> None:
    from bmojo.eval import by_position, score_documents

    use_threads(threads)
    model, codec = open_checkpoint(checkpoint, tokenizer)
    store = text_to_score(checkpoint, codec, text, errors)
    score = score_documents(model, store, max_bytes=max_bytes, context=context, seed=seed)
    positions = [2**i for i in range(FIRST_POSITION.bit_length() - 1, LAST_POSITION.bit_length())]
    positions = [position for position in positions if position <= store.lengths.max()]
    curve = positions and by_position(
        model,
        store,
        positions=positions,
        documents=LONG_DOCUMENTS,
        bytes_per_token=float(store.bytes.sum() / store.lengths.sum()),
        seed=seed,
    )
    if as_json:
        print(json.dumps({**asdict(score), "context": context, "by_position": curve}))
        return
    low, high = score.ci95
    print(f"{score.bits_per_byte:.4f} bits per byte, 95 % interval {low:.4f} to {high:.4f}")
    carried = "over whole documents, the state carried (`bmojo compare` empties it at the training length)"
    how = carried if context is None else f"the state emptied after every {context:,} tokens"
    print(f"{score.documents:,} documents, {score.bytes:,} bytes; {how}")
    for position, bits in curve:
        print(f"up to token {position:>6,}: {bits:.4f} bits per byte")


def text_to_score(checkpoint: Path, codec: Tokenizer, text: str | None, errors: str) -> Documents:
    """The documents of `text`, or those that the run in `checkpoint` held out. Raises DataError if it has none."""
    from bmojo.eval import TokenLists

    if text is not None:
        return TokenLists(read_documents(text, errors=errors), codec)
    if (checkpoint / "data").is_dir():
        return TextData(checkpoint / "data").eval
    raise DataError(f"{checkpoint} keeps no held-out text; name some with --text")
