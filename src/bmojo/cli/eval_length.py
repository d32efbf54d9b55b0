"""`bmojo eval length`: what a model still does on sequences longer than those it was trained on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from bmojo.cli.checkpoint import open_model, open_tokenizer, trained_length, trained_task
from bmojo.cli.eval import text_to_score
from bmojo.cli.options import AsJson, Checkpoint, Errors, Seed, Threads, TokenizerSpec, use_threads
from bmojo.cli.scores import TIMES, TRAINED, BatchSize, Rows, Scores, parse_numbers, print_left_out, print_table
from bmojo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bmojo.eval import Documents
    from bmojo.nn.model import BMojoLM

DOCUMENTS = 16


def length(
    checkpoint: Checkpoint,
    lengths: Annotated[
        str | None,
        typer.Option(help="In tokens, such as 512,8192; 1, 2, 4, 8 and 16 times the training length if left out."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="As of `bmojo eval`; for models that were trained on text.")] = None,
    tokenizer: TokenizerSpec = None,
    documents: Annotated[
        int, typer.Option(min=1, help="How many are read, those that come furthest first.")
    ] = DOCUMENTS,
    rows: Rows = 64,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    threads: Threads = None,
    errors: Errors = "strict",
    as_json: AsJson = False,
) -> None:
    use_threads(threads)
    model, folder = open_model(checkpoint)
    trained_on = trained_task(folder)
    numbers = parse_numbers("--lengths", lengths)
    if trained_on is not None and text is None and tokenizer is None:
        scores = Scores(model, trained_on, rows=rows, batch_size=batch_size, seed=seed)
        spans = numbers or [times * scores.own.length for times in TIMES]
        gap = trained_on.get("gap")  # grows by what the length does, so that every fact is further away
        more = {span: {} if gap is None else {"gap": max(0, gap + span - scores.own.length)} for span in spans}
        scores.add(({"length": span, **more[span]} for span in spans), required=lengths is not None)
        scores.show(TRAINED, trained_on, as_json)
        return
    own = trained_length(folder)
    if numbers is None:
        if own is None:
            raise ConfigError(f"{checkpoint} does not say at what length it was trained; give --lengths, as 512,8192")
        numbers = [times * own for times in TIMES]
    codec = open_tokenizer(model, folder, tokenizer)
    _text(model, text_to_score(checkpoint, codec, text, errors), numbers, own, documents, batch_size, seed,
          lengths is not None, as_json)  # fmt: skip


def _text(
    model: BMojoLM, store: Documents, positions: list[int], own: int | None, documents: int, batch_size: int,
    seed: int, required: bool, as_json: bool,
) -> None:  # fmt: skip
    from bmojo.eval.text import bootstrap_ratio, position_bits

    longest = int(store.lengths.max()) if len(store) else 0
    reason = f"the longest document has {longest:,} tokens; name longer ones with --text"
    beyond = [position for position in sorted(positions) if position > longest]
    if beyond and (required or len(beyond) == len(positions)):
        raise DataError(f"no document reaches {beyond[0]:,} tokens: {reason}")
    left_out = [{"change": {"length": position}, "reason": reason} for position in beyond]
    edges, bits, counts = position_bits(
        model,
        store,
        positions=[n for n in positions if n <= longest],
        documents=documents,
        batch_size=batch_size,
        seed=seed,
    )
    sizes = counts * store.bytes.sum() / store.lengths.sum()
    rows = []
    for i, (edge, before) in enumerate(zip(edges, [0, *edges], strict=False)):
        there = counts[:, i] > 0
        of, over = bits[there, i], sizes[there, i]
        ci95 = bootstrap_ratio(of, over, seed) if len(of) > 1 else None  # one document tells nothing of their spread
        score = {"bits_per_byte": of.sum() / over.sum(), "ci95": ci95}
        rows.append({"from": before, "to": edge, "documents": int(there.sum()), **score})
    if as_json:
        print(json.dumps({"trained_at": own, "by_position": rows, "left_out": left_out, "seed": seed}))
        return
    print(f"trained at {own:,} tokens" if own else "the training length is not known")
    cells = []
    for row in rows:
        between = "-" if row["ci95"] is None else "{:.4f} to {:.4f}".format(*row["ci95"])
        where = f"{row['from']:,} to {row['to']:,}"
        cells.append([where, f"{row['bits_per_byte']:.4f}", between, f"{row['documents']:,}"])
    print_table(("tokens", "bits per byte", "95 % interval", "documents"), cells)
    print_left_out(left_out)
