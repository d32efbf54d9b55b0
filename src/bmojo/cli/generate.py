"""`bmojo generate`: text from a trained model, going on from a saved state if there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bmojo.cli.checkpoint import open_checkpoint
from bmojo.cli.options import Checkpoint, Seed, Threads, TokenizerSpec, use_threads
from bmojo.errors import BMojoError, ConfigError, DataError


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="The same, from a UTF-8 file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the most likely tokens.")] = None,
    seed: Seed = 0,
    state: Annotated[Path | None, typer.Option(help="Write the state here at the end (.safetensors).")] = None,
    resume_state: Annotated[Path | None, typer.Option(help="Go on from a state that --state wrote.")] = None,
    tokenizer: TokenizerSpec = None,
    threads: Threads = None,
) -> None:
    from bmojo.generate import Stream, load_stream_state

    if prompt and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file are two prompts; give one")
    if state is not None:
        _require_writable(state)
    use_threads(threads)
    model, codec = open_checkpoint(checkpoint, tokenizer)
    memory, ids = (None, []) if resume_state is None else load_stream_state(resume_state, model)
    ids += codec.encode(prompt if prompt_file is None else _read(prompt_file)).tolist()
    if not ids:
        if resume_state is not None:
            raise DataError(f"{resume_state} has read all of its text: give --prompt or --prompt-file to go on from")
        raise DataError("there is nothing to go on from: give --prompt, --prompt-file or --resume-state")
    stream = Stream(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        state=memory,
    )
    decoder = codec.stream_decoder()
    for token in stream:
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush(), end="\n" if sys.stdout.isatty() else "", flush=True)
    if state is not None:
        stream.save(state)


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
