"""`bmojo train`: a model from text, in a run folder.

OUT/run.json        what the run is made of; another run in the same folder is refused
OUT/tokenizer.json  unless the tokens are bytes        OUT/data/      the tokens, with documents held out
OUT/model/          the trained model                  OUT/train.json, OUT/tensorboard/: how training went
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bmojo import presets
from bmojo.cli.options import (
    Errors,
    Model,
    Seed,
    Settings,
    Size,
    Text,
    Threads,
    parse_settings,
    use_threads,
    warn_unused,
)
from bmojo.data import (
    PackedRows,
    Tokenizer,
    load_tokenizer,
    prepare,
    read_documents,
    reopen,
    require_length,
    save_for_transformers,
    train_bpe,
)
from bmojo.errors import CheckpointError, ConfigError, DataError
from bmojo.files import write_whole

LEFTOVERS = {"tokenizer.json", "data"}  # of a run that ended before it began, as its text could not be used


def train(
    out: Annotated[Path, typer.Option(help="Run folder: a new one, or that of the same run to go on.")],
    model: Model = "bmojo",
    size: Size = "tiny",
    settings: Settings = None,
    text: Text = "stdlib",
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', 'bpe:SIZE' to train one on all of the text, held out or not, or a .json file.")
    ] = "bytes",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Rows a step; processes of torchrun share them.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Seed = 0,
    threads: Threads = None,
    errors: Errors = "strict",
    held_out: Annotated[float, typer.Option(help="Share of the documents held out for evaluation.")] = 0.05,
) -> None:
    changes = parse_settings(settings)
    if "vocab_size" in changes:
        raise ConfigError(f"vocab_size comes from the tokenizer, got --set vocab_size={changes['vocab_size']}; drop it")
    warn_unused(presets.get(model, size, **changes), changes)

    import torch

    from bmojo.nn.model import BMojoLM
    from bmojo.train import TrainSettings
    from bmojo.train import train as run
    from bmojo.train.checkpoints import require_same_run
    from bmojo.train.processes import processes

    use_threads(threads)
    schedule = TrainSettings(steps=steps, batch_size=batch_size, seq_len=seq_len, learning_rate=lr, seed=seed)
    state = processes()
    schedule.rows_per_process(state.num_processes)
    sources = {"text": text, "tokenizer": tokenizer, "errors": errors, "held_out": held_out}
    identity: dict[str, Any] = {"data": sources, "settings": schedule.to_dict()}
    with state.main_process_first():  # for the others of `torchrun -m bmojo train`, the run has begun
        begun = _begun(out)
        if begun is not None:
            require_same_run(begun, identity, out)
        codec = _make_tokenizer(tokenizer, text, errors, out, made=begun is not None)
        config = presets.get(model, size, **changes, vocab_size=codec.vocab_size)
        identity["config"] = config.to_dict()
        if begun is not None:
            require_same_run(begun, identity, out)
            data = reopen(text, out / "data")
        else:
            data = prepare(text, codec, out / "data", held_out=held_out, seed=seed, errors=errors)
            require_length(data, seq_len)
            if tokenizer == "bytes":
                (out / "tokenizer.json").unlink(missing_ok=True)  # a leftover would be taken for this model's
            write_whole(out / "run.json", (json.dumps(identity, indent=1) + "\n").encode())

    torch.manual_seed(seed)
    network = BMojoLM(config)
    columns = ("training", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    console = Console(stderr=True)
    shown = console.is_terminal and state.is_main_process
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        bar = progress.add_task("", total=steps, loss="")

        def show(step: int, loss: float) -> None:
            progress.update(bar, completed=step, loss=f"loss {loss:.3f}")

        record = run(network, PackedRows(data.train, seq_len, seed).__getitem__, schedule, out, on_step=show)
    if not state.is_main_process:
        return
    if not (out / "model" / "tokenizer_config.json").exists():
        save_for_transformers(codec, out / "model")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{model} {size}, {parameters:,} parameters, {record.tokens_trained:,} tokens in {record.seconds:.1f} s")
    print(f"loss {record.loss[-1][1]:.3f} nats per token, {record.tokens_per_second:,.0f} tokens/s")
    print(f"in {out}: model/, train.json, tensorboard/, data/ ({len(data.eval)} documents held out)")
    print(f"next: bmojo eval {out}")


def _begun(out: Path) -> dict[str, Any] | None:
    """What the run in the folder is made of, None if there is none yet."""
    from bmojo.train.checkpoints import read_json

    if (out / "run.json").exists():
        return read_json(out / "run.json")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a new folder for --out")
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
    if others := sorted(names - LEFTOVERS):
        raise CheckpointError(
            f"{out} holds other things than a run of `bmojo train`: {others[0]}, but no run.json; "
            "choose a new folder for --out"
        )
    return None


def _make_tokenizer(spec: str, text: str, errors: str, out: Path, *, made: bool) -> Tokenizer:
    """The tokenizer of the run; anything but bytes is kept in the run folder."""
    path = out / "tokenizer.json"
    if spec == "bytes":
        return load_tokenizer(spec)
    if made:
        return load_tokenizer(str(path))
    kind, colon, number = spec.partition(":")
    if kind == "bpe" and colon:
        if not number.isdecimal():
            raise DataError(f"--tokenizer bpe:SIZE takes a whole number of tokens, got {spec!r}; for example bpe:1024")
        return train_bpe(read_documents(text, errors=errors), int(number), path)
    load_tokenizer(spec)
    write_whole(path, Path(spec).read_bytes())
    return load_tokenizer(str(path))
