"""What a store of 10 million tokens costs a stream: time a token, resident memory, bytes on the disk.

    python benchmarks/storage.py --tokens 10000000 --out benchmarks/results/storage.json

A tiny bmojo model, untrained, reads real text (Python's standard library) into a store; from the first 400,000 tokens
on, blocks are those again, with noise of a tenth of their size on the keys, for the time that reading 10 million takes.
Then, in a new process: the resident memory of a stream before it has the store and after it has read and generated
with it, and rounds of decoding with and without, at several strides, one after the other. Medians over rounds; one
thread decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bmojo import BMojoLM, Store, Stream, presets
from bmojo.data import ByteTokenizer, read_documents
from bmojo.data.documents import Document
from bmojo.generate.remember import remember
from bmojo.memory.engines.engine import recall

REAL = 400_000  # tokens that are read
PREFILL, TOKENS, ROUNDS, STRIDES = 2048, 192, 9, (4, 16, 64)


def new_model(stride: int = 16) -> BMojoLM:
    torch.manual_seed(0)
    return BMojoLM(presets.bmojo("tiny", storage_layers=(-1,), storage_stride=stride)).eval()


def text(tokens: int) -> list[Document]:
    documents, total = [], 0
    for document in read_documents("stdlib"):
        documents.append(document)
        total += len(document.text.encode())
        if total >= tokens:
            break
    return documents


def fill(folder: Path, tokens: int) -> dict[str, float]:
    model, started = new_model(), time.perf_counter()
    with Store.open(folder, model, sync="close") as store:
        if store.stats()["tokens"] >= tokens:
            return {}
        list(remember(model, store, text(REAL), ByteTokenizer()))
        seconds = time.perf_counter() - started
        blocks, draw, copy = list(store.engine.scan()), np.random.default_rng(0), 0
        while store.stats()["tokens"] < tokens:
            copy += 1
            some = [
                replace(
                    block,
                    source=f"{block.source} {copy}",
                    keys=(block.keys + 0.1 * block.keys.std() * draw.standard_normal(block.keys.shape)).astype(
                        np.float16
                    ),
                )
                for block in blocks
            ]
            for start in range(0, len(some), 512):
                store.engine.put(some[start : start + 512])
    return {"read_tokens_per_second": REAL / seconds}


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def anonymous() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def asked(model: BMojoLM, store: Store, ids: np.ndarray) -> np.ndarray:
    """What the model asks the store for while it reads: [n, dim]."""
    queries, search = [], store.engine.search

    def noted(layer: int, rows: np.ndarray, *arguments, **options):
        queries.append(rows)
        return search(layer, rows, *arguments, **options)

    store.engine.search = noted  # type: ignore[method-assign]
    Stream(model, store=store, write=False).feed(ids)
    store.engine.search = search  # type: ignore[method-assign]
    found = np.concatenate(queries)
    return np.random.default_rng(1).permutation(found)


def measure(folder: Path) -> dict:
    torch.set_num_threads(1)
    ids = ByteTokenizer().encode(next(islice(read_documents("stdlib"), 5, None)).text * 10)[: 4 * PREFILL]
    base = new_model()
    models = {stride: base.with_settings(storage_stride=stride) for stride in STRIDES}
    list(Stream(base).feed(ids[:PREFILL]).generate(TOKENS))
    before, anon = resident(), anonymous()
    opened = time.perf_counter()
    store = Store.open(folder, base, mode="r")
    stream = Stream(base, store=store, write=False, seed=1)
    stream.feed(ids)
    list(stream.generate(1))
    opened = time.perf_counter() - opened
    list(stream.generate(TOKENS))
    after, anon_after = resident(), anonymous()
    result = {
        "resident_growth_mb": (after - before) / 1e6, "anonymous_growth_mb": (anon_after - anon) / 1e6,
        "open_and_first_seconds": opened, "stats": store.stats(),
    }  # fmt: skip
    streams = {"off": Stream(base, seed=1).feed(ids[:PREFILL])} | {
        stride: Stream(model, store=store, write=False, seed=1).feed(ids[:PREFILL]) for stride, model in models.items()
    }
    times: dict = {name: [] for name in streams}
    for _ in range(ROUNDS):
        for name, one in streams.items():
            start = time.perf_counter()
            list(one.generate(TOKENS))
            times[name].append((time.perf_counter() - start) / TOKENS * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result["ms_per_token"] = medians
    result["ratio"] = {
        name: statistics.median(a / b for a, b in zip(times[name], times["off"], strict=True)) for name in times
    }
    (layer,) = base.config.storage_layers
    queries, count = asked(base, store, ids[-PREFILL:]), base.config.storage_blocks
    single = []
    for query in queries[:200]:
        start = time.perf_counter()
        store.engine.search(layer, query[None], count, generation=store.pin())
        single.append((time.perf_counter() - start) * 1e3)
    result["query_p50_ms"] = statistics.median(single)
    result["recall_of_real_queries"] = recall(store.engine, layer, queries[:64], count, generation=store.pin())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--store", type=Path, default=Path("runs/storage-benchmark"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure the store that is there")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.store)))
        return
    filled = fill(given.store, given.tokens)
    command = [sys.executable, __file__, "--measure", "--store", str(given.store)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    result = {
        "command": f"python benchmarks/storage.py --tokens {given.tokens}", "machine": platform.processor() or "cpu",
        "torch": torch.__version__, **filled, **json.loads(found.stdout.splitlines()[-1]),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
