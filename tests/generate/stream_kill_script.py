"""Kills a process that streams with a store, again and again, and looks at what is left: the store serves all that was
acknowledged, and the stream that was saved last goes on as if nothing had happened. Run by test_stream_killed.py (a
process of its own, since it forks, which no process may that has loaded JAX), and by hand:

    python tests/generate/stream_kill_script.py FOLDER KILLS
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from bmojo import BMojoLM, Store, Stream, presets
from bmojo.memory.engines import open_store
from bmojo.memory.engines.verify import verify

SAVE = 10  # tokens between two times that the stream is saved
START = [1, 2, 3]


def made() -> BMojoLM:
    torch.manual_seed(0)
    return BMojoLM(presets.get(
        "bmojo", "tiny", vocab_size=50, hidden_size=16, num_heads=2, num_layers=1, chunk_size=8, window=16,
        ssm_head_dim=8, storage_layers=(0,), storage_block=8, storage_stride=4, storage_keys=2, storage_queries=2,
    )).eval()  # fmt: skip


def write(folder: Path, reader: BMojoLM, tell) -> None:
    """Stream until killed; `tell` of what is acknowledged."""
    path = folder / "stream.safetensors"
    with Store.open(folder / "store", reader, publish=0) as store:
        stream = Stream.load(path, reader, store=store) if path.exists() else Stream(reader, store=store, name="mine")
        if not stream.length:
            stream.feed(START)
        while True:
            list(stream.generate(SAVE))
            store.flush()
            tell(f"blocks {store.stats()['blocks']}")
            stream.save(path)
            tell(f"saved {stream.length}")


def kill(folder: Path, reader: BMojoLM, seed: int) -> dict[str, int]:
    """What a writer had told of when it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            write(folder, reader, lambda line: os.write(writing, f"{line}\n".encode()))
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        lines = [told.readline()]
        time.sleep(random.Random(seed).uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        lines += told.readlines()
    assert os.WIFSIGNALED(status)
    return {name: int(number) for name, number in map(str.split, lines)}


def check(folder: Path, reader: BMojoLM, kills: int) -> None:
    saved = 0
    for seed in range(kills):
        told = kill(folder, reader, seed)
        saved = max(saved, told.get("saved", 0))
        with open_store(folder / "store") as engine:
            assert len([*engine.scan()]) == engine.stats()["blocks"] >= told["blocks"]
        assert not verify(folder / "store").problems
    if not (path := folder / "stream.safetensors").exists():
        assert not saved
        return
    with Store.open(folder / "store", reader, publish=0) as store:
        stream = Stream.load(path, reader, store=store)
        length, mine = stream.length, {}
        assert length >= saved
        going_on = list(stream.generate(60))
        store.flush()
        for block in store.engine.scan():
            if stream.storage._owns(0, block):
                assert mine.setdefault(block.start, block) is block
    with Store.open(folder / "alone", reader, publish=0) as store:  # never killed
        expected = list(Stream(reader, store=store, name="mine").feed(START).generate(length - len(START) + 60))
    assert going_on == expected[-60:]
    read = [*START, *expected]
    assert sorted(mine) == list(range(0, (len(read) - 1) // 8 * 8, 8))
    for start, block in mine.items():
        assert block.tokens.tolist() == read[start : start + 8]


if __name__ == "__main__":
    torch.set_num_threads(1)
    check(Path(sys.argv[1]), made(), int(sys.argv[2]))
