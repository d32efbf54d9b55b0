"""The default store: how fast blocks are put, found and read, how long it takes to open, and what stays in memory.

    python benchmarks/store_engines.py --out benchmarks/results/store.json [--keys 100000,640000]

Blocks of 64 tokens (K and V of one head of 128, float16: 32 KB) with 4 keys of 128 dimensions each, drawn around 2,000
centres, as are the queries; 8 blocks are asked for. 640,000 keys are those of 10 million tokens. Each store is searched
by a process of its own, on one thread; times are medians of 64. Growth is of the resident set of that process, pages of
mapped files included, from before the store is opened to after 2,000 blocks were read besides those found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bmojo.files import write_whole
from bmojo.memory.engines import Block, index, open_store
from bmojo.memory.engines.engine import recall

DIM, TOKENS, KEYS, COUNT, QUERIES, SEED = 128, 64, 4, 8, 64, 0
READS = 2000  # blocks read after the searches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keys", default="100000,640000")
    parser.add_argument("--use", type=Path, help="measure this store, for the process that puts blocks")
    parser.add_argument("--flat", action="store_true", help="search it exactly")
    options = parser.parse_args()
    if options.use:
        print(json.dumps(use(options.use, options.flat)))
        return
    from bmojo.train.machine import machine

    report: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/store_engines.py",
        "machine": machine(),
        "seed": SEED,
        "put": [],
        "used": [],
    }

    def show(kind: str, **figures: Any) -> None:
        report[kind].append(figures)
        print(kind, {name: round(f, 3) if isinstance(f, float) else f for name, f in figures.items()}, flush=True)
        write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())

    with tempfile.TemporaryDirectory(prefix="bmojo") as place:
        folder = Path(place)
        for engine in ("lmdb", "sqlite"):
            for sync in ("block", "second", "close"):
                for batch in (1, 64):
                    rate = put(folder / f"{engine}-{sync}-{batch}", engine, sync, batch, 32 * batch)
                    show("put", engine=engine, sync=sync, batch=batch, blocks_per_second=rate)
        for keys in map(int, options.keys.split(",")):
            for engine in ("lmdb", "sqlite") if keys <= 100_000 else ("lmdb",):
                store = folder / f"{engine}-{keys}"
                rate = put(store, engine, "close", 256, keys // KEYS)
                for searched in ["exactly", "inverted, first", "inverted"] if keys > index.MANY else ["exactly"]:
                    command = [sys.executable, __file__, "--use", str(store), *["--flat"] * (searched == "exactly")]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    figures = json.loads(done.stdout)
                    show("used", engine=engine, keys=keys, searched=searched, blocks_per_second=rate, **figures)


def near(rng: np.random.Generator, n: int) -> np.ndarray:
    centres = np.random.default_rng(SEED).standard_normal((2000, DIM))
    return centres[rng.integers(2000, size=n)] + rng.standard_normal((n, DIM))


def put(folder: Path, engine: str, sync: str, batch: int, count: int) -> float:
    """Blocks a second."""
    rng, spent = np.random.default_rng(SEED), 0.0
    k, v = rng.standard_normal((2, TOKENS, 1, DIM)).astype(np.float16)
    tokens, score = np.arange(TOKENS, dtype=np.int32), np.zeros(TOKENS, np.float32)
    with open_store(folder, mode="a", engine=engine, sync=sync) as store:
        for first in range(0, count, batch):
            keys = near(rng, batch * KEYS).astype(np.float16).reshape(batch, KEYS, DIM)
            blocks = [Block(0, f"file {first // 1000}", 0, tokens, k, v, some, score) for some in keys]
            spent += timed(store.put, blocks)[0]
    return count / spent


def use(folder: Path, flat: bool) -> dict[str, Any]:
    if flat:
        index.MANY = 10**12
    queries = near(np.random.default_rng(SEED + 1), QUERIES).astype(np.float32)
    import faiss  # noqa: F401  (not what a store takes)

    process, figures = psutil.Process(), {}
    before = process.memory_info().rss
    figures["open_ms"], store = timed(open_store, folder)
    figures["open_ms"] *= 1e3
    generation = store.pin()
    figures["first_search_s"] = timed(store.search, 0, queries[:1], COUNT, generation=generation)[0]
    times: dict[str, list[float]] = {"query_p50_ms": [], "8_queries_p50_ms": [], "get_8_blocks_p50_ms": []}
    for at in range(QUERIES):
        taken, found = timed(store.search, 0, queries[at : at + 1], COUNT, generation=generation)
        times["query_p50_ms"].append(taken)
        times["get_8_blocks_p50_ms"].append(timed(store.get, found.id[0].tolist())[0])
        if at % 8 == 0:
            times["8_queries_p50_ms"].append(
                timed(store.search, 0, queries[at : at + 8], COUNT, generation=generation)[0]
            )
    figures |= {name: 1e3 * statistics.median(some) for name, some in times.items()}
    rng = np.random.default_rng(SEED)
    for _ in range(READS // 8):
        store.get(rng.integers(0, generation, 8).tolist())
    figures["growth_mb"] = (process.memory_info().rss - before) / 1e6
    figures["disk_mb"] = store.stats()["bytes"] / 1e6
    figures["recall"] = recall(store, 0, queries, COUNT, generation=generation)
    return figures


def timed(work: Callable[..., Any], *values: Any, **named: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work(*values, **named)
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    main()
