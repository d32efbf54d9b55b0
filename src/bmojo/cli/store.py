"""`bmojo store stats|compact|verify|export|forget`: what is in a store of blocks, and what to do with it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bmojo.cli.options import AsJson, StorePath
from bmojo.errors import StoreError
from bmojo.files import full_disk_told

if TYPE_CHECKING:
    from bmojo.memory.engines import Engine


def stats(store: StorePath, as_json: AsJson = False) -> None:
    from bmojo.memory.engines import open_store
    from bmojo.memory.faded import NOTES
    from bmojo.memory.store import half_lives

    with open_store(store) as engine:
        found, sources, learned = engine.stats(), engine.sources(), half_lives(engine)
    if sources.pop(NOTES, None) is not None:
        found["sources"] -= 1
    if as_json:
        lives = {layer: None if math.isinf(h) else h for layer, h in learned.items()}
        print(json.dumps({**found, "half_life": lives, "meta": engine.meta, "by_source": sources}))
        return
    hidden = f", {found['deleted']:,} more forgotten, not yet compacted" if found["deleted"] else ""
    print(f"{store}: {found['engine']}, {found['bytes'] / 1e6:,.1f} MB")
    print(f"{_blocks(found['blocks'])}{hidden}; {found['tokens']:,} tokens, of {found['sources']:,} sources")
    for name, facts in sorted(sources.items(), key=lambda item: -item[1]["tokens"])[:20]:
        print(f"{facts['tokens']:>12,}  {name}")
    if len(sources) > 20:
        print(f"and {len(sources) - 20:,} more sources: see --json")
    for layer, half_life in learned.items():
        print(f"layer {layer}: half-life {half_life:,.0f} blocks")


def compact(store: StorePath) -> None:
    with _to_change(store) as engine:
        before = engine.stats()
        with Console(stderr=True).status("copying what is left"):
            engine.compact()
        after = engine.stats()
    print(
        f"{_blocks(before['deleted'])} erased; {before['bytes'] / 1e6:,.1f} MB before, {after['bytes'] / 1e6:,.1f} now"
    )


def verify(
    store: StorePath,
    repair: Annotated[bool, typer.Option("--repair", help="Go on with what is whole in a damaged log.")] = False,
) -> None:
    from bmojo.memory.engines import verify as job

    if "://" in store:
        raise StoreError(f"{store} is kept by a server that looks after its files itself; verify is for folders")
    with _progress() as progress:
        bar = progress.add_task("reading", total=None)
        found = job.verify(store, lambda blocks: progress.update(bar, completed=blocks))
        if found.problems and repair:
            progress.update(bar, description="repairing", completed=0)
            repaired = job.repair(store, lambda blocks: progress.update(bar, completed=blocks))
            progress.update(bar, description="reading again", completed=0)
            found = job.verify(store, lambda blocks: progress.update(bar, completed=blocks))
            lost = ", ".join(f"{name!r} ({blocks:,})" for name, blocks in sorted(repaired.lost.items()))
            print(
                f"repaired: {_blocks(repaired.blocks)} kept"
                + (f"; lost, read these sources again: {lost}" if lost else "")
            )
    if found.problems:
        told = "; ".join(found.problems)
        raise StoreError(told if repair else f"{told}; bmojo store verify --repair --store {store} keeps what is whole")
    print(f"{_blocks(found.blocks)}, all whole")


def export(
    store: StorePath,
    out: Annotated[
        Path | None, typer.Option(help="The file to write, one JSON object a line; stdout if left out.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="'bytes' or a .json file: give the text, too.")] = None,
    source: Annotated[str | None, typer.Option(help="Only the blocks of this source.")] = None,
) -> None:
    """Of each block its id, layer, source, the position of its first token, and its tokens."""
    from bmojo.data.tokenizers import load_tokenizer
    from bmojo.memory.engines import open_store
    from bmojo.memory.engines.engine import no_source

    codec = None if tokenizer is None else load_tokenizer(tokenizer)
    with open_store(store) as engine:
        if source is not None and source not in (known := engine.sources()):
            raise no_source(source, known)

        def write(file: TextIO | None) -> int:
            written = 0
            with _progress(shown=out is not None) as progress:
                for block in progress.track(engine.scan(), total=engine.stats()["blocks"], description="blocks"):
                    if source in (None, block.source):
                        line = {"id": block.id, "layer": block.layer, "source": block.source, "start": block.start}
                        text = {} if codec is None else {"text": codec.decode(block.tokens)}
                        print(json.dumps({**line, "tokens": block.tokens.tolist(), **text}), file=file)
                        written += 1
            return written

        if out is None:
            write(None)
            return
        part = out.with_name(out.name + ".part")
        with full_disk_told(out.parent):
            with part.open("w", encoding="utf-8") as file:
                written = write(file)
            os.replace(part, out)
    print(f"{out}: {_blocks(written)}")


def forget(
    store: StorePath,
    source: Annotated[str, typer.Option(help="The source, as `bmojo store stats` names it.")],
    compact: Annotated[
        bool, typer.Option("--compact", help="Erase it from the files, too, which copies the rest.")
    ] = False,
) -> None:
    with _to_change(store) as engine:
        blocks = engine.delete(source)
        if compact:
            with Console(stderr=True).status("copying what is left"):
                engine.compact()
    rest = "erased" if compact else f"hidden; bmojo store compact --store {store} erases it from the files"
    print(f"{source}: {_blocks(blocks)} {rest}")


def _to_change(store: str) -> Engine:
    """The store opened for writing, if it is there."""
    from bmojo.memory.engines import open_store

    open_store(store).close()
    return open_store(store, mode="a")


def _blocks(count: int) -> str:
    return f"{count:,} block{'' if count == 1 else 's'}"


def _progress(*, shown: bool = True) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
