"""The family of `bmojo compare` at 100k parameters each against the best predictors there are.

    python benchmarks/universal.py --out docs/results/universal --work runs/universal [--sources markov_tree ...]
        [--models bmojo ...] [--seeds 0 1 2] [--steps 512] [--learning-rate 4e-3] [--window 8] [--train-only]

Trains each model on fresh sequences of each source, scores it at powers of two of steps, and writes the report of all
that is finished under `--work`. What is finished is not done again, and what was stopped goes on.

Sources and references: "universal", outputs of random programs of a small universal machine, against the table
M_{D,T} of the same machine, depth and steps, which is the exact optimum; "markov_tree", bits of random context trees,
against CTW of the same depth, which is the Bayes predictor; "linear_gaussian", quantised outputs of random stable
systems, against the Kalman filter that knows the system. Every figure is in bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmojo import presets
from bmojo.config import ModelConfig
from bmojo.data.synthetic import EVALUATION, Task, make_task, task_record
from bmojo.data.synthetic.linear_gaussian import LinearGaussian
from bmojo.data.synthetic.markov_tree import MarkovTree
from bmojo.figures import Picture, draw, make_picture, new_figure, token_axis, write_pictures
from bmojo.files import write_whole
from bmojo.nn.count import parameters
from bmojo.nn.model import BMojoLM
from bmojo.tables import Cell, Column, Table, markdown
from bmojo.train import TrainSettings, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows
from bmojo.universal.autoregression import AR
from bmojo.universal.ctw import CTW
from bmojo.universal.gap import Gap, InContext, Uniform, ctw_gap, kalman_gap, solomonoff_gap
from bmojo.universal.kt import KT
from bmojo.universal.table import SolomonoffTable

SEQUENCES = {"curve": 128, "final": 512}  # each of a source of its own, that a model is scored on
BEYOND = 4  # times the length trained on that models are also read at
BASE = "bmojo_f"  # what the others are compared with, source by source: `bmojo` is the same with eidetic slots
DEPTH, STEPS, BITS = 13, 1024, 16  # of the table, and of the programs that models are trained on


@dataclass(frozen=True)
class Source:
    """A task, the rows of a step, and the window of its models: also their chunk, fading span and number of slots."""

    title: str
    task: Task
    batch_size: int
    window: int
    reference: str

    def config(self, model: str) -> ModelConfig:
        changes: dict[str, Any] = {"window": self.window, "chunk_size": self.window}
        if model not in ("mamba2", "gdn"):
            changes["conv_size"] = 4  # all keys come from short convolutions, not only those of `bmojo`
        if model == "bmojo":
            changes["eidetic_slots"] = self.window
        return presets.matched(
            model, "tiny", vocab_size=self.task.vocab_size, hidden_size=64, num_layers=2, intermediate_size=169,
            ssm_head_dim=16, ssm_state_size=16, **changes,
        )  # fmt: skip

    def gap(self, predictor: Any, work: Path, sequences: int) -> Gap:
        if isinstance(self.task, MarkovTree):
            return ctw_gap(predictor, self.task, EVALUATION, sequences, self.task.depth).ctw
        if isinstance(self.task, LinearGaussian):
            return kalman_gap(predictor, self.task, EVALUATION, sequences)
        return solomonoff_gap(predictor, table(work))

    def in_context(self, model: BMojoLM) -> InContext:
        start = self.task.vocab_size - 1
        return InContext(model, range(start), start)

    def references(self, sequences: int) -> dict[str, Any]:
        """Predictors to set beside the models."""
        if not isinstance(self.task, LinearGaussian):
            return {"uniform": Uniform(), "KT": KT(), **{f"CTW-{depth}": CTW(depth) for depth in (1, 2, 4, 8)}}
        still = self.task.probabilities(np.zeros(1), np.ones(1))
        from_bins = self.task.predictions(EVALUATION, sequences, quantised=True)
        return {
            "marginal": Given(lambda x: np.broadcast_to(still, (*x.shape, still.shape[-1]))),
            "AR": AR(self.task.edges, self.task.centres),
            "Kalman, bins": Given(lambda x: self.task.probabilities(*from_bins)),  # type: ignore[attr-defined]
        }


@dataclass(frozen=True)
class Given:
    """A predictor made of a function."""

    distribution: Callable[[np.ndarray], np.ndarray]


SOURCES = {
    "universal": Source(
        "random programs", make_task("universal", length=BITS, depth=DEPTH, time_limit=STEPS), 256, 4, "the table"
    ),
    "markov_tree": Source("context trees", make_task("markov_tree", length=256, depth=10), 16, 32, "CTW"),
    "linear_gaussian": Source(
        "linear-Gaussian systems", make_task("linear_gaussian", length=128), 32, 16, "the Kalman filter"
    ),
}


@cache
def table(work: Path) -> SolomonoffTable:
    path = work / "table.npz"
    if not path.exists():
        checkpoint = work / "table-checkpoint.npz"
        SolomonoffTable.build(n_bits=BITS, depth=DEPTH, steps=STEPS, checkpoint=checkpoint).save(path)
    return SolomonoffTable.load(path, n_bits=BITS, depth=DEPTH, steps=STEPS)


def run(source: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and score one model: WORK/SOURCE/NAME-SEED/scores.json."""
    spec, folder = SOURCES[source], options.work / source / f"{name}-{seed}"
    if (folder / "scores.json").exists():
        return
    config = spec.config(name)
    settings = TrainSettings(
        steps=options.steps, batch_size=spec.batch_size, seq_len=spec.task.length, seed=seed,
        learning_rate=options.learning_rate, checkpoint_every=128,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BMojoLM(config)

    def score(kind: str) -> dict[str, Any]:
        gap = spec.gap(spec.in_context(model), options.work, SEQUENCES[kind])
        return {"total": gap.total, "positions": gap.positions.tolist(), "totals": gap.totals.tolist()}

    def on_step(step: int, loss: float) -> None:
        """Score at powers of two; what was scored before a stop is not scored again."""
        at = folder / "curve" / f"{step}.json"
        if step & (step - 1) == 0 and step >= 32 and not at.exists():
            total = score("curve")["total"]
            write_whole(at, json.dumps({"sequences": step * spec.batch_size, "total": total}).encode())
            print(source, name, seed, step, round(total, 3), flush=True)

    # every seed has data of its own, and none has those that are scored
    task = make_task(**{**task_record(spec.task), "seed": seed + 1})
    record = train(model, task_rows([task], spec.batch_size), settings, folder, on_step=on_step, tensorboard=False)
    curve = sorted(
        (json.loads(at.read_text()) for at in (folder / "curve").glob("*.json")), key=itemgetter("sequences")
    )
    report = {
        "source": source, "model": name, "seed": seed, "parameters": parameters(config), "config": config.to_dict(),
        "settings": settings.to_dict(), "seconds": record.seconds, "machine": machine(), "curve": curve,
        "final": score("final"),
    }  # fmt: skip
    write_whole(folder / "scores.json", (json.dumps(report) + "\n").encode())


Runs = dict[str, dict[str, list[dict[str, Any]]]]  # by source and model, one a seed


def report(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write OUT/results.json, table.md and figures of all runs that are finished."""
    runs: Runs = {
        source: {
            model: mine
            for model in presets.COMPARED
            if (mine := [run for run in found if (run["source"], run["model"]) == (source, model)])
        }
        for source in SOURCES
        if any(run["source"] == source for run in found)
    }
    references, shown = (
        {source: reference_gaps(source, kind, options.work) for source in runs} for kind in ("final", "curve")
    )
    text = (
        f"# Bits more than the best predictor needs, a sequence\n\n{gaps_table(runs, references)}\n\n"
        f"# Bits more than `{BASE}` needs of the same sequences, by seed\n\n{pairs_table(runs)}\n\n"
        f"# Bits a symbol, to {BEYOND} times the length trained on\n\n{beyond_table(runs, options.work)}\n"
    )
    for run in found:
        del run["config"], run["final"]["totals"]
        run["final"]["positions"] = np.round(run["final"]["positions"], 5).tolist()
    results = {
        "command": "python benchmarks/universal.py " + shlex.join(sys.argv[1:]), "sequences": SEQUENCES,
        "tasks": {source: task_record(SOURCES[source].task) for source in runs},
        "references": {source: {of: gap.total for of, gap in gaps.items()} for source, gaps in references.items()},
        "runs": found,
    }  # fmt: skip
    write_whole(options.out / "results.json", (json.dumps(results) + "\n").encode())
    write_whole(options.out / "table.md", text.encode())
    write_pictures(options.out / "figures", [by_context(runs, references), by_training(runs, shown)])
    print(text)


def reference_gaps(source: str, kind: str, work: Path) -> dict[str, Gap]:
    """What the references need on the sequences that models are scored on."""
    spec, sequences = SOURCES[source], SEQUENCES[kind]
    return {of: spec.gap(predictor, work, sequences) for of, predictor in spec.references(sequences).items()}


def trained(runs: Runs) -> list[str]:
    return [model for model in presets.COMPARED if any(model in models for models in runs.values())]


def gaps_table(runs: Runs, references: dict[str, dict[str, Gap]]) -> str:
    """Mean over the seeds, half of its 95 % interval over the sources, and the least and the most of several seeds."""
    columns = []
    for source, models in runs.items():
        totals = {model: np.array([run["final"]["totals"] for run in mine]) for model, mine in models.items()}
        totals |= {of: gap.totals[None] for of, gap in references[source].items()}
        cells = {}
        for model, of in totals.items():
            seeds = of.mean(1)
            apart = f" ({seeds.min():.2f} to {seeds.max():.2f})" if len(seeds) > 1 else ""
            cells[model] = Cell(float(of.mean()), with_interval(of.mean(0)) + apart, 0, 0)
        spec = SOURCES[source]
        columns.append(Column(source, (f"{spec.title}: bits over", spec.reference), cells, None))
    rows = [*trained(runs), *dict.fromkeys(of for gaps in references.values() for of in gaps)]
    return markdown(Table(rows, columns))


def pairs_table(runs: Runs) -> str:
    """By seed: the gap of a model less that of BASE, with half of the 95 % interval over the sources."""
    columns = []
    for source, models in runs.items():
        base = {run["seed"]: np.array(run["final"]["totals"]) for run in models.get(BASE, [])}
        cells = {}
        for model, mine in models.items():
            apart = [np.array(run["final"]["totals"]) - base[run["seed"]] for run in mine if run["seed"] in base]
            if apart and model != BASE:
                cells[model] = Cell(0, "; ".join(with_interval(each, "+") for each in apart), 0, 0)
        columns.append(Column(source, (SOURCES[source].title,), cells, None))
    return markdown(Table([model for model in trained(runs) if model != BASE], columns))


def beyond_table(runs: Runs, work: Path) -> str:
    """Mean gap a symbol in the second half of the length n trained on, from n to 2n, and from there to BEYOND n."""
    columns = []
    for source, models in runs.items():
        spec = SOURCES[source]
        if isinstance(spec.task, MarkovTree | LinearGaussian):  # the table has no more bits
            n, cells = spec.task.length, {}
            for model, mine in models.items():
                each = np.mean([beyond(run, work) for run in mine], axis=0)
                parts = [each[n // 2 : n], each[n : 2 * n], each[2 * n :]]
                cells[model] = Cell(0, ", ".join(f"{part.mean():.4f}" for part in parts), 0, 0)
            columns.append(
                Column(source, (f"{spec.title}: {n // 2} to {n},", f"to {2 * n}, to {BEYOND * n}"), cells, None)
            )
    return markdown(Table(trained(runs), columns))


def beyond(run: dict[str, Any], work: Path) -> np.ndarray:
    """The gap at each position of longer sequences of the same source; it is kept with the run."""
    folder = work / run["source"] / f"{run['model']}-{run['seed']}"
    kept = folder / "beyond.json"
    if not kept.exists():
        spec = SOURCES[run["source"]]
        spec = dataclasses.replace(spec, task=dataclasses.replace(spec.task, length=BEYOND * spec.task.length))
        gap = spec.gap(spec.in_context(BMojoLM.load(folder / "model")), work, SEQUENCES["curve"])
        write_whole(kept, json.dumps(gap.positions.tolist()).encode())
    return np.array(json.loads(kept.read_text()))


def with_interval(values: np.ndarray, sign: str = "") -> str:
    """The mean of what each source gave, and half of its 95 % interval; exact expectations have one value and none."""
    mean = f"{values.mean():{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.2f}"


LINES: dict[str, dict[str, Any]] = {
    of: {"color": colour, "linestyle": style, "linewidth": 1.2, "zorder": 1}
    for of, colour, style in (
        ("uniform", "#bbbbbb", ":"), ("KT", "#bbbbbb", "-"), ("CTW-1", "#999999", "-."), ("CTW-2", "#999999", "--"),
        ("CTW-4", "#555555", "-."), ("CTW-8", "#555555", "--"), ("marginal", "#555555", ":"), ("AR", "#555555", "-"),
        ("Kalman, bins", "#bbbbbb", "--"),
    )
}  # fmt: skip


def by_context(runs: Runs, references: dict[str, dict[str, Gap]]) -> Picture:
    """The gap at each position, the mean in windows that grow with it."""
    figure, axes = new_figure(len(runs), columns=3)
    for axis, (source, models) in zip(axes, runs.items(), strict=True):
        spec, gaps = SOURCES[source], references[source]
        ends = np.unique(np.round(2 ** np.arange(0, np.log2(spec.task.length) + 0.01, 0.5)).astype(int))
        starts = [0, *ends[:-1]]

        def points(positions: np.ndarray, starts: list[int] = starts, ends: np.ndarray = ends) -> Any:
            return [(end, positions[start:end].mean()) for start, end in zip(starts, ends, strict=True)]

        for of, gap in gaps.items():
            axis.plot(*zip(*points(gap.positions), strict=True), label=of, **LINES[of])
        for model, mine in models.items():
            positions = np.mean([run["final"]["positions"] for run in mine], axis=0)
            draw(axis, model, points(positions), markersize=3.5)
        most = max(gap.positions.max() for gap in gaps.values())
        _finish(axis, source, "place in the sequence", f"bits a symbol over {spec.reference}", most / 1000, most)
    return make_picture(figure, axes, "context", "Gap against context length.")


def by_training(runs: Runs, references: dict[str, dict[str, Gap]]) -> Picture:
    figure, axes = new_figure(len(runs), columns=3)
    for axis, (source, models) in zip(axes, runs.items(), strict=True):
        totals = [gap.total for gap in references[source].values()]
        for of, gap in references[source].items():
            axis.axhline(gap.total, label=of, **LINES[of])
        for model, mine in models.items():
            steps = zip(*(run["curve"] for run in mine), strict=True)
            points = [(at[0]["sequences"], np.mean([each["total"] for each in at])) for at in steps]
            totals += [total for _, total in points]
            draw(axis, model, points, markersize=3.5)
        label, least = f"bits a sequence over {SOURCES[source].reference}", max(min(totals), max(totals) / 400)
        _finish(axis, source, "training sequences", label, least / 1.5, max(totals))
    return make_picture(figure, axes, "training", "Gap against training size.")


def _finish(axis: Any, source: str, x: str, y: str, least: float, most: float) -> None:
    axis.set_title(SOURCES[source].title, fontsize=10)
    axis.set_yscale("log", nonpositive="mask")
    axis.set_ylim(least, 1.5 * most)
    token_axis(axis, x)
    axis.set_ylabel(y, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/universal"))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--models", nargs="+", choices=presets.COMPARED, default=list(presets.COMPARED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--window", type=int, help="instead of the window of each source; give other --out and --work")
    parser.add_argument("--train-only", action="store_true", help="no report: for one of several processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.window:
        SOURCES.update({name: dataclasses.replace(spec, window=options.window) for name, spec in SOURCES.items()})
    for seed in options.seeds:
        for source in options.sources:
            for name in options.models:
                run(source, name, seed, options)
    if not options.train_only:
        report([json.loads(path.read_text()) for path in sorted(options.work.glob("*/*/scores.json"))], options)


if __name__ == "__main__":
    main()
