"""The main job: train the family on the same batches, measure everything in one run, write results and report.

    runs/compare/<name>/job.json                what the run is; another job is refused this folder
                        data/                   the corpus as tokens
                        text/<preset>/          model/, train.json, tensorboard/, checkpoints/ while it trains, and
                        recall/<preset>/        entry.json: the model's finished entry of results.json
                        results.json  report.html  report.md  figures/

Every part is finished once and then only read, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import bmojo
from bmojo import presets
from bmojo.compare.profiles import CONTEXTS, RecallPlan, TextPlan, get_profile
from bmojo.compare.report import write_report
from bmojo.compare.results import write_results
from bmojo.config import ModelConfig
from bmojo.data import (
    FileTokenizer,
    PackedRows,
    TextData,
    Tokenizer,
    prepare,
    reopen,
    require_length,
    single_document_windows,
)
from bmojo.errors import CheckpointError, ConfigError, nearest
from bmojo.eval import by_position, decode_cost, recall, score_documents
from bmojo.files import full_disk_told, optional_module, write_whole
from bmojo.nn.count import parameters
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM
from bmojo.train import TrainRecord, train
from bmojo.train.machine import machine
from bmojo.train.tasks import task_rows

SUITES = ("text", "recall")
TOLERANCE = 0.02  # largest relative difference in parameters between the models of a suite
SAMPLE_TOKENS = 768  # of the text that shows what the eidetic memories kept
WEIGHT_OF_EVALUATION = 0.3  # in training steps of the model: for the progress bar


class Watcher(Protocol):
    """What the job tells whoever watches."""

    def start(self, total: float) -> None:
        """The job begins; `total` is its work, in the unit of `advance`."""

    def model(self, name: str, steps: int) -> None:
        """A model begins, of so many training steps."""

    def step(self, step: int, loss: float) -> None:
        """A training step of it is done."""

    def stage(self, what: str) -> None:
        """Something else than training begins."""

    def done(self, entry: dict[str, Any], work: float) -> None:
        """The model is finished; `work` is all of its work."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `bmojo compare` is asked to do."""

    folder: Path
    profile: str = "quick"
    models: tuple[str, ...] = presets.COMPARED
    suites: tuple[str, ...] = SUITES
    text: str = "stdlib"
    errors: str = "strict"
    seed: int = 0
    command: str = "bmojo compare"

    def __post_init__(self) -> None:
        for what, chosen, known in (("model", self.models, presets.PRESETS), ("suite", self.suites, SUITES)):
            if not chosen:
                raise ConfigError(f"no {what} chosen; {nearest('', known)}")
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"unknown {what} {name!r}; {nearest(name, known)}")
            if len(set(chosen)) < len(chosen):
                raise ConfigError(f"a {what} is named twice in {','.join(chosen)}; name each once")
        get_profile(self.profile)


def run(job: Job, tokenizer: Tokenizer, watcher: Watcher) -> dict[str, Any]:
    """Do the job, or what is left of it; returns the results and writes them with their report."""
    for module in ("transformers", "accelerate", "jsonschema", "jinja2", "matplotlib"):
        optional_module(module, "bmojo compare")  # now, not after the first model has trained
    profile = get_profile(job.profile)
    plans: dict[str, TextPlan | RecallPlan] = {
        suite: dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=job.seed))
        for suite, plan in (("text", profile.text), ("recall", profile.recall))
        if suite in job.suites
    }
    configs = {suite: {name: _config(plan, name, tokenizer) for name in job.models} for suite, plan in plans.items()}
    for suite, of_suite in configs.items():
        require_equal(suite, of_suite)
    with full_disk_told(job.folder):
        identity = _identity(job, plans, configs, tokenizer)
        begun = _begun(job.folder, identity)
        data = None
        if "text" in plans:
            watcher.stage("reading the text")
            folder = job.folder / "data"
            if begun:
                data = reopen(job.text, folder)
            else:
                data = prepare(job.text, tokenizer, folder, seed=job.seed, errors=job.errors)
            require_length(data, plans["text"].train.seq_len)
        if not begun:  # only now, so that text that can't be used leaves the folder free
            write_whole(job.folder / "job.json", (json.dumps(identity, indent=1) + "\n").encode())
            if isinstance(tokenizer, FileTokenizer):  # so that eval and generate find it beside the models
                write_whole(job.folder / "tokenizer.json", tokenizer.path.read_bytes())
        works = {suite: plan.train.steps * (1 + WEIGHT_OF_EVALUATION) for suite, plan in plans.items()}
        watcher.start(sum(works.values()) * len(job.models))
        results = _results(job, plans, data)
        folders = {(suite, name): job.folder / suite / name for suite in plans for name in job.models}
        entries = {key: entry for key, folder in folders.items() if (entry := _finished(folder)) is not None}
        for (suite, name), folder in folders.items():
            plan = plans[suite]
            watcher.model(f"{suite}/{name}", plan.train.steps)
            if (suite, name) not in entries:
                entries[suite, name] = _entry(folder, plan, name, configs[suite][name], data, tokenizer, watcher)
            results["models"] = [entries[key] for key in folders if key in entries]
            write_results(job.folder / "results.json", results)
            watcher.done(entries[suite, name], works[suite])
        watcher.stage("writing the report")
        write_report(job.folder, results)
    return results


def _config(plan: TextPlan | RecallPlan, name: str, tokenizer: Tokenizer) -> ModelConfig:
    """The preset at the profile's size, at equal parameters."""
    changes = dict(plan.changes)
    if isinstance(plan, RecallPlan):
        changes["vocab_size"] = plan.task(plan.pairs).vocab_size
        if name == "bmojo":
            changes["eidetic_slots"] = plan.eidetic_slots
    else:
        changes["vocab_size"] = tokenizer.vocab_size
    return presets.matched(name, plan.size, **changes)


def require_equal(suite: str, configs: dict[str, ModelConfig]) -> None:
    """Raise ConfigError unless the models have the same number of parameters, within TOLERANCE."""
    counts = {name: parameters(config) for name, config in configs.items()}
    small, large = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[large] > counts[small] * (1 + TOLERANCE):
        raise ConfigError(
            f"the models of suite {suite} must be equal in parameters within {TOLERANCE:.0%}, "
            f"got {counts[small]:,} ({small}) and {counts[large]:,} ({large}); leave one out with --models"
        )


def _identity(job: Job, plans: dict, configs: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """What job.json says: all that decides the results."""
    return {
        "profile": job.profile,
        "text": job.text,
        "errors": job.errors,
        "seed": job.seed,
        "models": list(job.models),
        "suites": list(job.suites),
        "tokenizer": tokenizer.sha256,
        "threads": torch.get_num_threads(),
        "device": machine()["device"],
        "settings": {suite: plan.train.to_dict() for suite, plan in plans.items()},
        "configurations": {suite: {n: c.to_dict() for n, c in of.items()} for suite, of in configs.items()},
    }


def _begun(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the job was begun in the folder. Raises CheckpointError if that is another job's, or no comparison's."""
    path = folder / "job.json"
    if not path.exists():
        # a job that failed over its text may have left data, one that was killed something hidden
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if any(name != "data" and not name.startswith(".") for name in names):
            raise CheckpointError(f"{folder} holds something that is no comparison; use another --name")
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; use another --name") from None
    for name, value in identity.items():
        got = found.get(name) if isinstance(found, dict) else None
        if got != value:
            both = f": {json.dumps(got)} there, {json.dumps(value)} here" if len(json.dumps([got, value])) < 300 else ""
            raise CheckpointError(
                f"{folder} was made with another {name}{both}; use another --name, or the same options to go on"
            )
    return True


def _results(job: Job, plans: dict[str, Any], data: TextData | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"parameter_tolerance": TOLERANCE}
    for suite, plan in plans.items():
        prefix = "" if suite == "text" else "recall_"
        window = plan.changes.get("window", presets.SIZES[plan.size]["window"])
        settings |= {f"{prefix}train_length": plan.train.seq_len, f"{prefix}window": window}
        settings |= {
            f"{suite}_size": plan.size,
            f"{suite}_steps": plan.train.steps,
            f"{suite}_batch": plan.train.batch_size,
        }
    return {
        "version": 1,
        "name": job.folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": job.seed,
        "profile": job.profile,
        "command": job.command,
        "bmojo": bmojo.__version__,
        "settings": settings,
        "corpus": None if data is None else data.corpus_record(),
        "machine": machine(),
        "models": [],
    }


def _entry(
    folder: Path, plan: TextPlan | RecallPlan, name: str, config: ModelConfig, data: TextData | None,
    tokenizer: Tokenizer, watcher: Watcher,
) -> dict[str, Any]:  # fmt: skip
    """Train the model, or what is left of that, and measure it: its entry of results.json, kept in the folder."""
    torch.manual_seed(plan.train.seed)
    model = BMojoLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    suite = "text" if isinstance(plan, TextPlan) else "recall"
    if isinstance(plan, TextPlan):
        assert data is not None
        rows = PackedRows(data.train, plan.train.seq_len, plan.train.seed).__getitem__
    else:
        rows = mqar_rows(plan)
    record = train(model, rows, plan.train, folder, on_step=watcher.step)
    model.eval()
    entry: dict[str, Any] = {"name": f"{suite}/{name}", "suite": suite, "preset": name, **_trained(model, record)}
    empty: dict[str, Any] = {"bits_per_byte": None, "bits_per_byte_ci95": None, "by_position": [], "recall": []}
    if isinstance(plan, TextPlan):
        assert data is not None
        watcher.stage("scoring held-out text")
        entry["eval"] = empty | score_text(model, plan, data)
        if config.eidetic_slots:
            entry["memory_sample"] = memory_sample(model, data, tokenizer)
    else:
        watcher.stage("scoring recall")
        entry["eval"] = empty | {"recall": score_recall(model, plan)}
    watcher.stage("timing decoding")
    entry["decode"] = decode_cost(model, CONTEXTS)
    entry["configuration"] = config.to_dict()
    write_whole(folder / "entry.json", json.dumps(entry).encode())
    return entry


def _finished(folder: Path) -> dict[str, Any] | None:
    """The entry of a model that was finished before."""
    path = folder / "entry.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; delete it to measure the model again") from None


def _trained(model: BMojoLM, record: TrainRecord) -> dict[str, Any]:
    return {
        "parameters": parameters(model.config),
        "tokens_trained": record.tokens_trained,
        "train": {
            "loss": record.loss,
            "tokens_per_second": record.tokens_per_second,
            "seconds": record.seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
        },
    }


def score_text(model: BMojoLM, plan: TextPlan, data: TextData) -> dict[str, Any]:
    score = score_documents(
        model, data.eval, max_bytes=plan.eval_bytes, context=plan.train.seq_len, batch_size=16, seed=plan.train.seed
    )
    positions = by_position(
        model,
        data.eval,
        positions=plan.positions,
        documents=plan.position_documents,
        bytes_per_token=float(data.eval.bytes.sum() / data.eval.num_tokens),
        seed=plan.train.seed,
    )
    return {"bits_per_byte": score.bits_per_byte, "bits_per_byte_ci95": list(score.ci95), "by_position": positions}


def score_recall(model: BMojoLM, plan: RecallPlan) -> list[dict[str, Any]]:
    window, length = plan.changes["window"], plan.train.seq_len
    scores = []
    for task, distance in plan.distances(window):
        where = "inside the window" if distance < window else "beyond the window"
        where = "beyond the training length" if task.length > length else where
        scores += [{**score, "where": where} for score in recall(model, task, [distance], rows=plan.eval_rows)]
    return scores


def mqar_rows(plan: RecallPlan) -> Callable[[int], dict[str, np.ndarray]]:
    """Training row i of the recall suite."""
    return task_rows([plan.task(plan.few), *3 * [plan.task(plan.pairs)]], plan.train.batch_size)


@torch.inference_mode()
def memory_sample(model: BMojoLM, data: TextData, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What each layer's eidetic memory kept of the start of a held-out document, and every token's innovation."""
    long = single_document_windows(data.eval, SAMPLE_TOKENS, 1, 0)
    document = int(long[0]) if len(long) else int(np.argmax(data.eval.lengths))
    tokens = np.asarray(data.eval[document][:SAMPLE_TOKENS]).astype(np.int64)
    trace = Trace()
    model.features(torch.from_numpy(tokens)[None].to(model.embed.weight.device), trace=trace)
    decoder = tokenizer.stream_decoder()
    text = [decoder.push(int(token)) for token in tokens]
    layers = [
        {"layer": i, "innovation": score[0].tolist(), "kept": sorted(p for p in kept[0].tolist() if p >= 0)}
        for i, (score, kept) in enumerate(zip(trace.innovation, trace.kept, strict=True))
    ]
    return {"text": text, "layers": layers}
