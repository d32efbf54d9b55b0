"""`bmojo remember`: text into a store, for a model to find again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bmojo.cli.checkpoint import open_model, open_tokenizer
from bmojo.cli.options import Checkpoint, Errors, StorePath, Threads, TokenizerSpec, use_threads
from bmojo.cli.stores import open_with
from bmojo.data.documents import Document, read_documents, source_files


def remember(
    checkpoint: Checkpoint,
    files: Annotated[list[str], typer.Argument(help="Files, folders, globs, 'stdlib' or hf:NAME[:CONFIG].")],
    store: StorePath,
    engine: Annotated[str | None, typer.Option(help="Of a new store: lmdb or sqlite.")] = None,
    tokenizer: TokenizerSpec = None,
    errors: Errors = "strict",
    threads: Threads = None,
) -> None:
    from bmojo.generate.remember import remember as read_into

    for source in files:
        source_files(source)  # what can't be found is said before anything is made
    use_threads(threads)
    model, folder = open_model(checkpoint)
    codec = open_tokenizer(model, folder, tokenizer)
    model, opened = open_with(model, store, mode="a", engine=engine)
    counts = {"read": 0, "skipped": 0, "tokens": 0}
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        SpinnerColumn(),
        TextColumn("{task.completed:,} tokens"),
        TimeElapsedColumn(),
    )
    with opened, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        for done in read_into(
            model, opened, _documents(files, errors), codec, progress=lambda tokens: bar.advance(task, tokens)
        ):
            counts["read" if done.tokens else "skipped"] += 1
            counts["tokens"] += done.tokens
            bar.update(task, description=f"reading ({counts['read']} documents, {counts['skipped']} there already)")
    print(f"{counts['read']} documents read ({counts['tokens']:,} tokens), {counts['skipped']} were there already")


def _documents(files: list[str], errors: str) -> Iterator[Document]:
    """Named by the paths given, so that documents of two folders don't take each other's place."""
    for source in files:
        path = Path(source)
        for document in read_documents(source, errors=errors):
            if path.is_dir():
                yield Document((path / document.name).as_posix(), document.text)
            elif path.is_file() and document.name == path.name:
                yield Document(path.as_posix(), document.text)
            else:
                yield Document(f"{source}:{document.name}", document.text)
