"""`bmojo generate`: text from a trained model, going on from a stream on disk if there is one."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bmojo.cli.checkpoint import open_model, open_tokenizer
from bmojo.cli.options import Checkpoint, Seed, Threads, TokenizerSpec, use_threads
from bmojo.cli.stores import open_with
from bmojo.data.tokenizers import Tokenizer
from bmojo.errors import BMojoError, ConfigError, DataError
from bmojo.files import locked

if TYPE_CHECKING:
    from bmojo.memory.attention import Attention


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="The same, from a UTF-8 file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the most likely tokens.")] = None,
    seed: Seed = 0,
    stream: Annotated[str | None, typer.Option(help="Keep the stream under this name and go on from it.")] = None,
    streams_dir: Annotated[
        Path | None, typer.Option(help="Folder of --stream; default: streams in the model's.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Long-term memory to read, and, with --stream, to hand over to; see `bmojo remember`."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Hand nothing over to --store.")] = False,
    stride: Annotated[int | None, typer.Option(help="Tokens between two searches of --store.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks found by each.")] = None,
    cite: Annotated[bool, typer.Option("--cite", help="Say which stored text was attended to most.")] = False,
    decay: Annotated[bool, typer.Option("--decay", help="What is old in --store counts less, as is learned.")] = False,
    state: Annotated[Path | None, typer.Option(help="Write the stream here at the end (.safetensors).")] = None,
    resume_state: Annotated[Path | None, typer.Option(help="Go on from a stream that --state wrote.")] = None,
    tokenizer: TokenizerSpec = None,
    threads: Threads = None,
) -> None:
    from bmojo.generate import Stream
    from bmojo.memory.attention import Attention

    if prompt and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file are two prompts; give one")
    if stream is not None and (state is not None or resume_state is not None):
        raise ConfigError("--stream keeps the stream by itself; leave out --state and --resume-state")
    if stream is None and streams_dir is not None:
        raise ConfigError("--streams-dir is the folder of --stream; name the stream")
    if store is None and (read_only or cite or decay or stride is not None or blocks is not None):
        raise ConfigError("--read-only, --stride, --blocks, --cite and --decay are about a store; give --store")
    if state is not None:
        _require_writable(state)
    use_threads(threads)
    model, folder = open_model(checkpoint)
    codec = open_tokenizer(model, folder, tokenizer)
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    with contextlib.ExitStack() as held:
        if store is not None:
            write = stream is not None and not read_only
            model, opened = open_with(model, store, mode="a" if write else "r", stride=stride, blocks=blocks)
            settings |= {"store": held.enter_context(opened), "write": write}
        if stream is not None:
            state = held.enter_context(_kept(streams_dir or folder / "streams", stream))
            resume_state = state if state.exists() else None
        if resume_state is None:
            text = Stream(model, codec, name=stream, decay=decay, **settings)
        else:
            text = Stream.load(resume_state, model, codec, **settings)
            if decay and not (text.storage is not None and text.storage.decays):
                raise ConfigError(
                    f"{resume_state} was begun without --decay; go on without it, or begin another stream"
                )
        text.feed(prompt if prompt_file is None else _read(prompt_file))
        if not text.snapshot().unread:
            raise DataError("there is nothing to go on from: give --prompt or --prompt-file")
        if cite:
            assert text.storage is not None
            text.storage.attention = Attention()
        try:
            for piece in text.text(max_new_tokens):
                print(piece, end="", flush=True)
            if state is None:
                print(text.held_back, end="")
            print(end="\n" if sys.stdout.isatty() else "", flush=True)
            if text.storage is not None and text.storage.attention is not None:
                _cite(text.storage.attention, codec)
        finally:  # after Ctrl-C, too, the stream holds what was shown
            if state is not None:
                text.save(state)


@contextlib.contextmanager
def _kept(folder: Path, name: str) -> Iterator[Path]:
    """The file of the stream `name`, which no other process uses meanwhile."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"--stream takes a name of letters, digits, '_', '-' and '.', got {name!r}")
    path = folder / f"{name}.safetensors"
    with locked(folder / f".{name}.lock", f"the stream {name!r} in {folder} is in use by another process; try later"):
        for left in folder.glob(f".{path.name}.*"):  # of a process that was killed while it wrote
            left.unlink()
        yield path


def _cite(attention: Attention, codec: Tokenizer) -> None:
    """Where the attention of the generated tokens went, on stderr, so that stdout holds the text alone."""
    spans = attention.spans()
    share = attention.total / max(1, attention.tokens)
    print(f"bmojo: {share:.0%} of the attention of {attention.tokens} tokens went to stored text", file=sys.stderr)
    for span in spans:
        quoted = codec.decode(span.tokens).replace("\n", " ")
        print(f"  {span.weight:5.1%}  {span.source} [{span.start}, {span.end}): {quoted!r}", file=sys.stderr)


def _require_writable(state: Path) -> None:
    """Make the folder of --state, or say now, not after the last token, that it can't be written."""
    if state.is_dir():
        raise ConfigError(f"--state takes a file, got the folder {state}; for example {state / 'state.safetensors'}")
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(state.parent, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise BMojoError(f"can't write --state {state}: {reason}; choose a file in a folder of yours")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not valid UTF-8; convert the file") from error
