"""`bmojo compress` and `bmojo decompress`: files in as few bytes as a model finds them probable."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bmojo.cli.checkpoint import open_checkpoint, trained_length
from bmojo.cli.options import Threads, TokenizerSpec, use_threads
from bmojo.data.tokenizers import ByteTokenizer
from bmojo.errors import BMojoError, CompressionError, ConfigError
from bmojo.files import write_whole

if TYPE_CHECKING:
    from bmojo.universal.compress import Coder, LanguageModel

SUFFIX = ".bmz"
BUILT_IN = {"kt": 0, "ctw": 6}  # and the depth of CTW that it is

File = Annotated[Path, typer.Argument(help="The file to read.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output if it is there.")]


def compress(
    file: File,
    model: Annotated[str, typer.Option(help="A run folder or model folder; or 'ctw', or 'kt', which need none.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write; FILE.bmz if left out.")] = None,
    force: Force = False,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Parts that a model reads side by side: fewer are slower and shorter.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Empty a model's memory after every so many tokens; never if left out, or, for one that keeps "
            "the whole past, what it was trained on.",
        ),
    ] = None,
    tokenizer: TokenizerSpec = None,
    threads: Threads = None,
) -> None:
    from bmojo.universal.byte_ctw import ByteCTW
    from bmojo.universal.compress import compress

    out = Path(f"{file}{SUFFIX}") if out is None else out
    _require_free(out, force)
    data = file.read_bytes()
    coder: Coder
    if model in BUILT_IN:
        if streams is not None or context is not None or tokenizer is not None:
            raise ConfigError(f"--streams, --context and --tokenizer are of trained models; leave them out for {model}")
        coder = ByteCTW(BUILT_IN[model])
    else:
        use_threads(threads)
        coder = _trained(Path(model), tokenizer, streams, context)
    begin = time.perf_counter()
    with _progress("compressing", len(data)) as on_bytes:
        packed = compress(data, coder, on_bytes)
    write_whole(out, packed)
    seconds = time.perf_counter() - begin
    rate = f", {8 * len(packed) / len(data):.3f} bits per byte" if data else ""
    print(f"{out}: {len(data):,} bytes in {len(packed):,}{rate}; {len(data) / seconds / 1000:,.1f} kB/s")


def decompress(
    file: File,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write; FILE without .bmz if left out.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The run folder or model folder that FILE was made by, if it was.")
    ] = None,
    force: Force = False,
    tokenizer: TokenizerSpec = None,
) -> None:
    from bmojo.universal.byte_ctw import ByteCTW
    from bmojo.universal.compress import decompress, read_head

    if out is None and file.suffix != SUFFIX:
        raise ConfigError(f"{file} does not end in {SUFFIX}; name the file to write: --out")
    out = file.with_suffix("") if out is None else out
    _require_free(out, force)
    packed = file.read_bytes()
    try:
        head, _ = read_head(packed)
        made = head["coder"]
        if made["name"] == "ctw":
            if model is not None or tokenizer is not None:
                warnings.warn(
                    f"ignored: --model and --tokenizer; {file} was made by ctw, without a model", stacklevel=1
                )
            coder: Coder = ByteCTW(made["depth"], made["prior"])
        elif model is None:
            raise CompressionError(f"it was made by the model {made.get('fingerprint')}; give its folder: --model")
        else:
            coder = _trained(model, tokenizer, made["streams"], made["context"], made["computed"]["threads"])
        begin = time.perf_counter()
        with _progress("decompressing", head["length"]) as on_bytes:
            data = decompress(packed, coder, on_bytes)
    except CompressionError as error:
        raise CompressionError(f"{file}: {error}") from None
    write_whole(out, data)
    print(f"{out}: {len(data):,} bytes, as they were; {len(data) / (time.perf_counter() - begin) / 1000:,.1f} kB/s")


def _trained(
    folder: Path, tokenizer: str | None, streams: int | None, context: int | None, threads: int | None = None
) -> LanguageModel:
    from bmojo.presets import bounded
    from bmojo.universal.compress import STREAMS, LanguageModel

    model, codec = open_checkpoint(folder, tokenizer)
    if threads is None and context is None and not bounded(model.config):
        context = trained_length(folder)
    return LanguageModel(
        model,
        None if isinstance(codec, ByteTokenizer) else codec,
        streams=STREAMS if streams is None else streams,
        context=context,
        threads=threads,
    )


def _require_free(out: Path, force: bool) -> None:
    """Say now, not after the last byte, that the output can't be written."""
    if out.is_dir():
        raise BMojoError(f"{out} is a folder; name a file to write: --out")
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise BMojoError(f"can't write to the folder of {out}: it is missing, or not yours; make it, or choose another")
    if out.exists() and not force:
        raise BMojoError(f"{out} is there already; overwrite it with --force, or name another file: --out")


@contextmanager
def _progress(what: str, length: int) -> Iterator[Callable[[int], Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=length)
        yield lambda done: progress.update(bar, completed=done)
