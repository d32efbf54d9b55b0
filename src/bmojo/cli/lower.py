"""`bmojo lower`: a step of a model as a program for XLA, and what it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bmojo import presets
from bmojo.cli.options import AsJson, Model, Settings, Size, parse_settings, warn_unused
from bmojo.errors import ConfigError, nearest

STEPS = ("train", "prefill", "decode")


def lower(
    model: Model = "bmojo",
    size: Size = "tiny",
    settings: Settings = None,
    step: Annotated[str, typer.Option("--what", help="The step: train, prefill or decode.")] = "decode",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    time: Annotated[int, typer.Option(min=1, help="Tokens of a row, in training and prefill.")] = 256,
    context: Annotated[int, typer.Option(min=0, help="Room of the caches of layers without a window.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write StableHLO to FILE.mlir, or for neuronx-cc an HLO proto to FILE.pb.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    changes = parse_settings(settings)
    config = presets.get(model, size, **changes)
    warn_unused(config, changes)
    if step not in STEPS:
        raise ConfigError(f"unknown step {step!r}; {nearest(step, STEPS)}")
    if out is not None and out.suffix not in (".mlir", ".pb"):
        raise ConfigError(f"--out must end in .mlir (StableHLO) or .pb (HLO proto), got {out}")
    from bmojo import lower as lowering
    from bmojo.nn.model import BMojoLM

    built = BMojoLM(config)
    match step:
        case "train":
            program = lowering.trace(*lowering.training_step(built, batch=batch, time=time))
        case "prefill":
            program = lowering.trace(*lowering.prefill(built, batch=batch, time=time, context=context))
        case _:
            program = lowering.trace(*lowering.decode_step(built, batch=batch, context=context))
    operators, undocumented = program.operators(), program.undocumented()
    if out is not None:
        out.write_bytes(program.hlo() if out.suffix == ".pb" else program.stablehlo().encode())
    if as_json:
        types = sorted(program.element_types())
        print(json.dumps({"operators": operators, "element_types": types, "undocumented": undocumented}))
        return
    for name, count in operators.most_common():
        print(f"{count:7,}  {name}")
    print(
        f"{operators.total():7,}  operations of {model} {size}, {step}; numbers: {', '.join(program.element_types())}"
    )
    version = lowering.neuron_operators()["version"]
    print(f"not in the documentation of {version}: {', '.join(undocumented) or 'none'}")
