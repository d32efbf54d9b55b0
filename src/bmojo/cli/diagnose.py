"""`bmojo diagnose`: are a trained model's prediction errors white, and if not, which memory does it lack?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmojo.cli.checkpoint import open_checkpoint
from bmojo.cli.eval import text_to_score
from bmojo.cli.options import AsJson, Checkpoint, Errors, Seed, Threads, TokenizerSpec, use_threads
from bmojo.cli.scores import parse_numbers, print_table
from bmojo.errors import ConfigError
from bmojo.files import optional_module, write_whole

if TYPE_CHECKING:
    from bmojo.eval.diagnose import Band, Diagnosis, Probe

FEATURES = ("embedding", "one-hot")


def diagnose(
    checkpoint: Checkpoint,
    text: Annotated[str | None, typer.Option(help="As of `bmojo eval`; the run's held-out text if left out.")] = None,
    tokenizer: TokenizerSpec = None,
    lags: Annotated[
        str | None,
        typer.Option(help="Where bands of lags end; 1,4,16,64,256,1024,4096 as far as the text goes if left out."),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, max=64, help="Numbers that a token's error is projected to.")] = 8,
    features: Annotated[
        str, typer.Option(help="What a token is: its 'embedding' in the model, or 'one-hot' (of a small vocabulary).")
    ] = "embedding",
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Empty the state after every so many tokens of a document; never if left out."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Read at most so many tokens; all if left out.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it here (.png).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    errors: Errors = "strict",
    as_json: AsJson = False,
) -> None:
    from bmojo.eval.diagnose import bands, choose, draw, reach, read, token_basis
    from bmojo.eval.diagnose import diagnose as test

    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise ConfigError(f"--plot takes the path of a .png, got {plot}")
        optional_module("matplotlib", "--plot")
    if features not in FEATURES:
        raise ConfigError(f"--features must be one of {', '.join(FEATURES)}, got {features!r}")
    optional_module("scipy.special", "bmojo diagnose", "realize")
    edges = parse_numbers("--lags", lags)
    if edges is not None:
        bands(edges)
    use_threads(threads)
    model, codec = open_checkpoint(checkpoint, tokenizer)
    remembers = reach(model.config, context)
    chosen = choose(text_to_score(checkpoint, codec, text, errors), edges, reach=remembers, max_tokens=max_tokens)
    embedding = model.embed.weight if features == "embedding" else None
    basis = token_basis(chosen.counts(model.config.vocab_size), embedding, channels=channels)
    found = test(read(model, chosen, basis, context=context), chosen.bands, seed=seed)
    content = {**asdict(found), "reach": remembers, "context": context, "features": features, "seed": seed,
               "left_out": chosen.left_out}  # fmt: skip
    if out is not None:
        write_whole(out, (json.dumps(content, indent=1) + "\n").encode())
    if plot is not None:
        write_whole(plot, draw(found, checkpoint.name, remembers))
    if as_json:
        print(json.dumps(content))
        return
    _show(found)
    for line in [*in_words(found, remembers), *(f"left out: {line}" for line in chosen.left_out)]:
        print(line)


def _show(found: Diagnosis) -> None:
    print(f"errors of {found.tokens:,} predictions in {found.channels} channels, explained on the last half by")
    rows = []
    whole = (1, found.bands[-1][1])
    for band, *probes in zip([*found.bands, whole], found.own_past, found.text, found.repeats, strict=True):
        inside = [lag for lag in found.lags if band[0] <= lag <= band[1]]
        fails = f"{len(set(inside) & set(found.failing))} of {len(inside)}"
        rows.append([_lags(band), fails, *map(_cell, probes)])
    print_table(("lags", "fail", "past errors, %", "past text, %", "repeats, %"), rows)
    print("share of the variance, and half of its 95 % interval; * more than by chance")


def in_words(found: Diagnosis, reach: int | None) -> list[str]:
    """What the figures say, for who has not read how they are made."""
    columns = {"the text before": found.text, "repeats": found.repeats, "its own past": found.own_past}
    failing = {
        name: [(band, probe) for band, probe in zip(found.bands, column, strict=False) if probe.fails]
        for name, column in columns.items()
    }
    if found.white:
        return [f"white: nothing tried predicts the errors (all lags together: p = {found.p:.2g})"]
    if not (found.failing or any(failing.values())):
        return [f"not white: all lags together say so (p = {found.p:.2g}), but none by itself, and no band"]
    words = ["not white: what went before tells more than the model makes of it"]
    for name, fails in failing.items():
        words.append(f"from {name}, its errors are predictable {_best(fails)}" if fails else
                     f"from {name}, no band of lags predicts its errors")  # fmt: skip
    if reach is None:
        return [*words, "no lag is out of this model's reach: it lacks training, size, or a memory that keeps more"]
    found_beyond = [(band, probe) for name in ("the text before", "repeats") for band, probe in failing[name]]
    beyond = [entry for entry in found_beyond if entry[0][0] > reach]
    within = [entry for entry in found_beyond if entry[0][1] <= reach]
    across = [entry for entry in found_beyond if entry[0][0] <= reach < entry[0][1]]
    knows = f"the model knows the last {reach:,} tokens"
    # Where a model makes little of what it knows, what came before stands in for it.
    alone = not (within or across) and any(band[0] > reach for band, _ in failing["the text before"])
    memory = "so it lacks memory" if alone else "so memory would help, unless training makes it needless"
    words.append(f"{knows}: what came before them predicts its errors, {memory}, {_best(beyond)}" if beyond
                 else f"{knows}: what came before them does not predict its errors")  # fmt: skip
    rest = "so training or size would help" if beyond or across else "so it lacks training or size"
    words.append(f"what it knows predicts its errors, {rest}, {_best(within)}" if within
                 else "what it knows does not predict its errors")  # fmt: skip
    if across:
        where = " and ".join(_lags(band) for band in sorted({band for band, _ in across}))
        words.append(f"lags {where} fail, in part known and in part not: end --lags at {reach} to tell which")
    return words


def _best(fails: list[tuple[Band, Probe]]) -> str:
    """Where, and the largest share with its interval."""
    runs: list[list[int]] = []
    for first, last in sorted({band for band, _ in fails}):
        if runs and first == runs[-1][1] + 1:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    band, probe = max(fails, key=lambda entry: entry[1].share)
    where = " and ".join(_lags((first, last)) for first, last in runs)
    most = "" if list(band) == runs[0] else f", most at {_lags(band)}"
    low, high = probe.ci95
    return (
        f"at lags {where}{most}: {_percent(probe.share)} % of their variance "
        f"(95 % interval {_percent(low)} to {_percent(high)})"
    )


def _lags(band: Band) -> str:
    first, last = band
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}" if abs(share) < 0.1 else f"{100 * share:.1f}"


def _cell(probe: Probe) -> str:
    low, high = probe.ci95
    return f"{_percent(probe.share)} ± {_percent((high - low) / 2)}{'*' if probe.fails else ' '}"
