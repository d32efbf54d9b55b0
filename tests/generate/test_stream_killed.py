"""A process that streams with a store may be killed at any moment: the store serves all that was acknowledged, and the
stream that was saved last goes on as if nothing had happened."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stream_kill_script import model

from bmojo import Store, Stream
from bmojo.memory.engines import open_store
from bmojo.memory.engines.verify import verify

SCRIPT = Path(__file__).with_name("stream_kill_script.py")


def kill(folder: Path, seed: int) -> tuple[int, int]:
    """Blocks acknowledged, and tokens saved, when the process was killed."""
    with subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(random.Random(seed).uniform(0, 0.4))
        process.kill()
        lines += process.stdout.readlines()
    told = dict(line.split() for line in lines if line.endswith("\n"))
    return int(told["flushed"]), int(told.get("saved", 0))


def check(folder: Path, kills: int) -> None:
    reader, saved, expected = model(), 0, []
    for seed in range(kills):
        blocks, now = kill(folder, seed)
        saved = max(saved, now)
        with open_store(folder / "store") as engine:
            kept = list(engine.scan())
            assert len(kept) >= blocks
            assert engine.stats()["blocks"] == len(kept)
        assert not verify(folder / "store").problems
    path = folder / "stream.safetensors"
    with Store.open(folder / "store", reader, publish=0) as store:
        stream = Stream.load(path, reader, store=store)
        assert stream.length >= saved
        length = stream.length
        going_on = list(stream.generate(60))
        mine = [b for b in store.engine.scan() if stream.storage._owns(0, b) and b.start + len(b.tokens) <= length]
        mine = sorted({b.start: b for b in mine}.values(), key=lambda b: b.start)
        assert [b.start for b in mine] == list(range(0, 8 * len(mine), 8))
    with Store.open(folder / "alone", reader, publish=0) as store:  # never killed
        expected = list(Stream(reader, store=store, name="mine").feed([1, 2, 3]).generate(length - 3 + 60))
    assert going_on == expected[-60:]
    read = torch.tensor([1, 2, 3, *expected])
    for block in mine:
        assert block.tokens.tolist() == read[block.start : block.start + 8].tolist()


def test_a_killed_stream_goes_on(tmp_path):
    check(tmp_path, 2)


@pytest.mark.slow
def test_a_stream_killed_30_times_goes_on(tmp_path):
    check(tmp_path, 30)
