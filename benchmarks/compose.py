"""Memories of documents composed, against reading the documents again: quality, and time.

    bmojo train --out runs/text-mamba2 --model mamba2 --steps 700 --seq-len 512          (and bmojo)
    bmojo sweep mqar --out runs/mqar --models bmojo,mamba2 --set length=384 --set pairs=16 ...
    python benchmarks/compose.py --text runs/text-* --recall runs/mqar/trials/* --out docs/results/compose

Text: K passages of a held-out document are read each by itself, and stored; then comes what follows them: a prompt,
which every way of remembering reads, and a continuation, whose bits per byte are counted. Recall: the half of MQAR that
holds the pairs, cut into K documents, with or without a token of filler behind each; the half that asks is the
continuation. Sections that are not run anew are kept. The ways of remembering:

    again       all documents read one after the other: what composition stands for
    given, cyclic, all      `bmojo.compose` in order, over the rotations (PICASO-R), over all orders (PICASO-S)
    last        the memory of the last document alone
    none        no memory

Differences of bits per byte are paired, with 95 % intervals over texts. Time: medians, one thread, of composing K
documents of L tokens from a store on disk, from memory, and of reading them again (tracked or not), in one run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo import BMojoLM, MemoryState, StateStore, compose
from bmojo.data import reopen
from bmojo.data.synthetic import EVALUATION, MQAR, NO_ANSWER, make_task
from bmojo.figures import make_picture, new_figure, token_axis, write_pictures
from bmojo.files import write_whole
from bmojo.memory.composition import ORDERS
from bmojo.train.machine import machine

WAYS = ("again", *ORDERS, "last", "none")
COLOURS = dict(zip(WAYS, ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#777777"), strict=True))
PASSAGE, PROMPT, CONTINUATION = 256, 16, 128  # bytes
SEGMENT = 512  # tokens a call
ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="run folders of `bmojo train`, on bytes")
    parser.add_argument("--recall", type=Path, nargs="*", default=[], help="trials of `bmojo sweep mqar`, spread pairs")
    parser.add_argument("--documents", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--texts", type=int, default=128, help="texts a figure; of recall, sequences")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens a document, for time")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    path = options.out / "compose.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"text": {}, "time": {}, "recall": {}}
    results |= {"machine": machine(), "seed": 0, "texts": options.texts}
    results["bytes"] = {"passage": PASSAGE, "prompt": PROMPT, "continuation": CONTINUATION}
    commands = results.setdefault("commands", {})
    for section in ("text", "time") * bool(options.text) + ("recall",) * bool(options.recall):
        results[section], commands[section] = {}, shlex.join(["python", *sys.argv])
    for folder in options.text:
        model, name = open_run(folder)
        data = reopen(json.loads((folder / "run.json").read_text())["data"]["text"], folder / "data").eval
        rows = [text_row(model, data, count, options.texts) for count in options.documents]
        results["text"][name] = dict(zip(map(str, options.documents), rows, strict=True))
        results["time"][name] = times(model, options.documents, options.lengths)
    for folder in options.recall:
        model, name = open_run(folder)
        task = make_task(**json.loads((folder / "task.json").read_text()))
        assert isinstance(task, MQAR)
        for separators in (0, 1):
            rows = [recall_row(model, task, count, separators, options.texts) for count in options.documents]
            title = f"{name}, {task.pairs} pairs" + ", separator" * separators
            results["recall"][title] = dict(zip(map(str, options.documents), rows, strict=True))
    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
    write_pictures(options.out, [picture(results)])
    print(json.dumps({key: results[key] for key in ("text", "recall", "time")}, indent=1))


def open_run(folder: Path) -> tuple[BMojoLM, str]:
    model = BMojoLM.load(folder / "model").eval()
    return model, "bmojo" if "bmojo" in model.config.pattern else model.config.ssm.replace("ssd", "mamba2")


def read(model: BMojoLM, tokens: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
    """Features of the last call, and the state after all of `tokens` [batch, time]."""
    state = model.empty_state(len(tokens)).tracked() if state is None else state
    for part in tokens.split(SEGMENT, 1):
        features, state = model.features(part, state)
    return features, state


def remembered(model: BMojoLM, documents: list[Tensor]) -> Iterator[tuple[str, MemoryState]]:
    """The memory of documents [batch, time] by each way."""
    states = [read(model, tokens)[1] for tokens in documents]
    yield "again", read(model, torch.cat(documents, 1))[1]
    for order in ORDERS:
        yield order, compose(states, order)
    yield "last", states[-1]
    yield "none", model.empty_state(len(documents[0])).tracked()


def scored(
    batches: Iterator[tuple[list[Tensor], Tensor]], model: BMojoLM, score: Callable[[MemoryState, Tensor], Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Of each way `score` [texts], and how far its SSM states are from those of reading again, layer by layer."""
    scores: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    errors: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for documents, after in batches:
        memories = dict(remembered(model, documents))
        for way, memory in memories.items():
            scores[way].append(score(memory, after))
            pairs = zip(memory.layers, memories["again"].layers, strict=True)
            errors[way].append([float((a["ssm"] - b["ssm"]).norm() / b["ssm"].norm()) for a, b in pairs])
    means = {way: np.mean(rows, 0).round(4).tolist() for way, rows in errors.items()}
    return {way: torch.cat(parts).double().numpy() for way, parts in scores.items()}, means


def text_row(model: BMojoLM, data: Any, count: int, texts: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    size = count * PASSAGE + PROMPT + CONTINUATION + 1
    long_enough = [i for i in range(len(data)) if data.lengths[i] >= size]

    def batches() -> Iterator[tuple[list[Tensor], Tensor]]:
        for _ in range(texts // ROWS):
            rows = []
            for document in draw.choice(long_enough, ROWS):
                start = draw.integers(data.lengths[document] - size + 1)
                rows.append(np.asarray(data[document][start : start + size], np.int64))
            tokens = torch.from_numpy(np.stack(rows))
            yield list(tokens[:, : count * PASSAGE].split(PASSAGE, 1)), tokens[:, count * PASSAGE :]

    def bits(memory: MemoryState, after: Tensor) -> Tensor:
        logits = model.logits(model.features(after[:, :-1], memory)[0])[:, PROMPT:]
        return F.cross_entropy(logits.mT, after[:, PROMPT + 1 :], reduction="none").mean(1) / np.log(2)

    scores, errors = scored(batches(), model, bits)
    row: dict[str, Any] = {}
    for way, values in scores.items():
        gain = scores["none"] - values
        row[way] = {
            "bits_per_byte": round(float(values.mean()), 4),
            "gain_over_none": round(float(gain.mean()), 4),
            "interval": round(1.96 * float(gain.std(ddof=1)) / len(gain) ** 0.5, 4),
            "state_error": errors[way],
        }
    return row


def recall_row(model: BMojoLM, task: MQAR, count: int, separators: int, texts: int) -> dict[str, Any]:
    """`separators`: tokens of filler behind each document."""
    assert task.spread
    facts = (task.length - task.gap) // 4 * 2
    behind = torch.full((ROWS, separators), task.first_filler)

    def batches() -> Iterator[tuple[list[Tensor], Tensor]]:
        for number in range(texts // ROWS):
            batch = task.batch(EVALUATION + number, ROWS)
            tokens, labels = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["labels"])
            documents = tokens[:, :facts].split(facts // count, 1)
            after = torch.stack((tokens, labels))[..., facts:]
            yield [torch.cat((document, behind), 1) for document in documents], after

    def accuracy(memory: MemoryState, after: Tensor) -> Tensor:
        tokens, labels = after
        right = model.logits(model.features(tokens, memory)[0]).argmax(-1) == labels
        return right.sum(1) / (labels != NO_ANSWER).sum(1)

    scores, errors = scored(batches(), model, accuracy)
    return {way: {"accuracy": round(float(scores[way].mean()), 4), "state_error": errors[way]} for way in WAYS}


def times(model: BMojoLM, documents: list[int], lengths: list[int]) -> list[dict[str, Any]]:
    """Seconds; "stored" reads the states from files first."""
    rows = []
    for length in lengths:
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (max(documents), 1, length), generator=draw)
        with tempfile.TemporaryDirectory() as folder:
            store = StateStore(folder, model.config, model.fingerprint())
            for i, document in enumerate(tokens):
                store.put(str(i), read(model, document)[1])
            for count in documents:
                held = [store.get(str(i)) for i in range(count)]
                everything = tokens[:count].view(1, -1)
                runs: dict[str, Callable[[], Any]] = {
                    "again": lambda everything=everything: read(model, everything, model.empty_state()),
                    "tracked": lambda everything=everything: read(model, everything),
                    "stored": lambda count=count, store=store: compose([store.get(str(i)) for i in range(count)]),
                    **{order: lambda order=order, held=held: compose(held, order) for order in ORDERS},
                }
                taken: dict[str, list[float]] = {name: [] for name in runs}
                for _ in range(5):
                    for name, run in runs.items():
                        begin = time.perf_counter()
                        run()
                        taken[name].append(time.perf_counter() - begin)
                medians = {name: round(statistics.median(seconds), 5) for name, seconds in taken.items()}
                rows.append({"tokens": length, "documents": count, "state_bytes": held[0].nbytes, "seconds": medians})
    return rows


def picture(results: dict[str, Any]) -> Any:
    panels = [("text", name, "gain_over_none") for name in results["text"]]
    panels += [("recall", name, "accuracy") for name in results["recall"]]
    figure, axes = new_figure(len(panels) + 1, columns=3)
    for axis, (kind, name, what) in zip(axes, panels, strict=False):
        rows = results[kind][name]
        for way in WAYS:
            points = [row[way][what] for row in rows.values()]
            axis.plot(list(map(int, rows)), points, color=COLOURS[way], marker="o", markersize=4, label=way)
        token_axis(axis, "documents")
        axis.set_title(f"{name}: {'bits per byte gained' if kind == 'text' else what}", fontsize=8)
    most = max(row["documents"] for rows in results["time"].values() for row in rows)
    for name, rows in results["time"].items():
        rows = [row for row in rows if row["documents"] == most]
        for way in ("stored", *ORDERS):
            ratio = [row["seconds"]["again"] / row["seconds"][way] for row in rows]
            axes[-1].plot(
                [row["tokens"] for row in rows], ratio, color=COLOURS.get(way, "#56B4E9"), marker="o", markersize=4,
                linestyle="-" if name == "bmojo" else "--", label=way,
            )  # fmt: skip
    token_axis(axes[-1], f"tokens a document, of {most}")
    axes[-1].set_yscale("log")
    axes[-1].set_title("times as fast as reading again (bmojo: solid)", fontsize=8)
    return make_picture(figure, axes, "compose", "Memories of documents composed, and the documents read again.")


if __name__ == "__main__":
    main()
