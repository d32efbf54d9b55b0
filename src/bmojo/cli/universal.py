"""`bmojo universal table|search|plot|gap`: Solomonoff's prediction on short strings, and how far a model is from it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bmojo.cli.options import AsJson
from bmojo.cli.scores import print_table
from bmojo.errors import UniversalError, nearest

if TYPE_CHECKING:
    from bmojo.universal.search import LevinSearch
    from bmojo.universal.table import SolomonoffTable

Machine = Annotated[str, typer.Option(help="The universal machine: bp7 (7 instructions) or bp6.")]
PREDICTORS = ("uniform", "kt", "ctw")


def table(
    out: Annotated[Path, typer.Option(help="The table, an .npz.")],
    bits: Annotated[int, typer.Option(help="Length of the strings.")] = 16,
    depth: Annotated[int, typer.Option(help="The most instructions of a program.")] = 13,
    steps: Annotated[int, typer.Option(help="The most steps from one instruction drawn to the next.")] = 1024,
    machine: Machine = "bp7",
    threads: Annotated[int, typer.Option(min=1, help="Threads that walk programs.")] = 2,
    as_json: AsJson = False,
) -> None:
    from bmojo.universal.table import SolomonoffTable

    if out.is_dir():
        raise UniversalError(f"{out} is a folder; name the file to write: --out {out / 'table.npz'}")
    checkpoint, begin = out.with_name(out.name + ".part"), time.monotonic()
    settings = {"machine": machine, "n_bits": bits, "depth": depth, "steps": steps}
    if out.exists():
        made = SolomonoffTable.load(out, **settings)
    else:
        console = Console(stderr=True)
        columns = (
            TextColumn("layer {task.completed} of {task.total}"),
            BarColumn(),
            TextColumn("{task.fields[nodes]:,} nodes"),
        )
        with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=depth, nodes=0)
            made = SolomonoffTable.build(
                machine,
                bits,
                depth,
                steps,
                checkpoint=checkpoint,
                threads=threads,
                progress=lambda layers, nodes: bar.update(task, completed=layers, nodes=nodes),
            )
        made.save(out)
        checkpoint.unlink(missing_ok=True)
    seconds = time.monotonic() - begin
    if as_json:
        print(json.dumps({**_facts(made), "seconds": round(seconds, 3), "table": str(out)}))
        return
    print(f"{out}: {made.machine}, {bits} bits, {depth} instructions, {steps:,} steps; {seconds:.1f} s")
    print_table(
        ("mass", "programs", "share"),
        [(kind, f"{count:,}", f"{count / made.total:.3g}") for kind, count in made.mass().items()],
    )
    print(f"all      {made.total:,} = {made.size}^{depth}")
    print(
        f"entropy  {made.entropy():.3f} bits of {bits}; the gap of the uniform predictor is {bits - made.entropy():.3f}"
    )
    covered = [f"{t}: {count:,}/{1 << t:,}" for t, count in enumerate(made.coverage()) if t in _some(bits)]
    print(f"coverage {'  '.join(covered)}  (length: strings that some program prints)")
    print_table(("most probable", "M(x)"), [(text, f"{share:.3g}") for text, share in made.top(5) if share])


def search(
    data: Annotated[str, typer.Argument(help="Bits, such as 0101010101.")],
    machine: Machine = "bp7",
    max_phase: Annotated[int, typer.Option(help="The budget: programs with Kt of up to so many bits.")] = 30,
    as_json: AsJson = False,
) -> None:
    from bmojo.universal.search import levin_search

    console = Console(stderr=True)
    with console.status("phase 1") as status:
        found = _interruptibly(
            lambda: levin_search(data, machine, max_phase, lambda so_far: status.update(_so_far(so_far)))
        )
    if as_json:
        text = {"program": found.program, "length": found.length, "bits": found.bits, "steps": found.steps}
        kt = None if found.program is None else found.kt
        print(json.dumps({"data": found.data, "machine": found.machine, **text, "kt": kt, **_spent(found)}))
    elif found.program is None:
        print(f"not found: every program of {found.machine} that prints {found.data} has Kt above {found.phase} bits")
        print(f"({found.nodes:,} programs, {found.spent:,} steps; a larger --max-phase looks further)")
    else:
        print(f"program  {found.program}")
        print(f"length   {found.length} instructions, {found.bits:.2f} bits")
        print(f"steps    {found.steps:,}")
        print(f"Kt       {found.kt:.2f} bits")
        print(f"cost     {found.nodes:,} programs and {found.spent:,} steps in {found.phase} phases")
    if found.program is None:
        raise typer.Exit(1)


def plot(
    tables: Annotated[list[Path], typer.Argument(help="A table, and others of lower depth to show how it converges.")],
    out: Annotated[Path, typer.Option(help="The figure, a .png.")],
) -> None:
    from bmojo.files import write_whole
    from bmojo.universal.plot import table_picture
    from bmojo.universal.table import SolomonoffTable

    write_whole(out, table_picture([SolomonoffTable.load(path) for path in tables]).png)
    print(out)


def gap(
    model: Annotated[Path | None, typer.Argument(help="A run folder, or its model folder.")] = None,
    table: Annotated[Path, typer.Option(help="The table, made by `bmojo universal table`.")] = Path("table.npz"),
    predictor: Annotated[str | None, typer.Option(help="Instead of a model: uniform, kt or ctw.")] = None,
    ctw_depth: Annotated[int, typer.Option(help="Of the predictor ctw.")] = 4,
    as_json: AsJson = False,
) -> None:
    from bmojo.universal.gap import solomonoff_gap
    from bmojo.universal.table import SolomonoffTable

    if (model is None) == (predictor is None):
        raise UniversalError("give a model or --predictor uniform|kt|ctw: what is the gap of")
    loaded = SolomonoffTable.load(table)
    name, asked = (str(model), _model(model)) if model is not None else _predictor(str(predictor), ctw_depth)
    found = solomonoff_gap(asked, loaded)
    if as_json:
        facts = {"predictor": name, "table": str(table), "gap": found.total, "entropy": found.entropy}
        print(json.dumps({**facts, "positions": found.positions.tolist(), "reference": found.reference.tolist()}))
        return
    print(f"{name} against {table} ({loaded.machine}, {loaded.n_bits} bits, {loaded.depth} instructions)")
    print(f"gap      {found.total:.3f} bits over {loaded.n_bits} bits; the table itself needs {found.entropy:.3f}")
    rows = enumerate(zip(found.reference, found.positions, strict=True), 1)
    print_table(("bit", "table needs", "gap"), [(str(t), f"{need:.4f}", f"{more:.4f}") for t, (need, more) in rows])


def _model(path: Path) -> Any:
    from bmojo.cli.checkpoint import open_model
    from bmojo.universal.gap import InContext

    opened, folder = open_model(path)
    if opened.config.vocab_size != 3:
        raise UniversalError(
            f"{folder} has a vocabulary of {opened.config.vocab_size}; the gap is of models of bits, with 3 tokens: "
            "0, 1 and the start, 2. The task `universal` trains one"
        )
    return InContext(opened)


def _predictor(name: str, depth: int) -> tuple[str, Any]:
    from bmojo.universal.ctw import CTW
    from bmojo.universal.gap import Uniform
    from bmojo.universal.kt import KT

    if name not in PREDICTORS:
        raise UniversalError(f"unknown predictor {name!r}; {nearest(name, PREDICTORS)}")
    if name == "ctw":
        return f"ctw of depth {depth}", CTW(depth)
    return name, Uniform() if name == "uniform" else KT()


def _facts(table: SolomonoffTable) -> dict[str, Any]:
    settings = {name: getattr(table, name) for name in ("machine", "n_bits", "depth", "steps")}
    results = {"mass": table.mass(), "total": table.total, "entropy": table.entropy(), "coverage": table.coverage()}
    return {**settings, **results, "top": [{"string": text, "probability": share} for text, share in table.top(10)]}


def _spent(found: LevinSearch) -> dict[str, int]:
    return {"phases": found.phase, "nodes": found.nodes, "spent": found.spent}


def _so_far(found: LevinSearch) -> str:
    return f"phase {found.phase + 1}: programs with Kt of up to {found.phase + 1} bits; {found.spent:,} steps so far"


def _some(bits: int) -> list[int]:
    """Lengths worth a line: each to 4, then even ones, and the last."""
    return [t for t in range(1, bits + 1) if t <= 4 or t % 2 == 0 or t == bits]


def _interruptibly(work: Any) -> Any:
    """The result of `work`, compiled and deaf to Ctrl-C, in a thread that the process need not wait for."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
