"""Kills writers of a store at seeded moments, and looks at what they leave. Run by test_store_killed.py, and by hand:

    python tests/memory/engines/kill_script.py FOLDER ENGINE FIRST_SEED KILLS

A writer tells by a pipe what it is about to do, and that it is done. What was done must be there, the one thing that
was being done wholly or not at all. Prints how often each thing was interrupted.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from bmojo.memory.engines import Block, encode, open_store
from bmojo.memory.engines.block import with_id
from bmojo.memory.engines.verify import verify

SOURCES = "abcd"
ONE_STORE = 20  # kills before a new one is begun


def made(number: int, source: str) -> Block:
    rng = np.random.default_rng(number)
    n = int(rng.integers(1, 65))
    k, v = rng.standard_normal((2, n, 2, 8)).astype(np.float16)
    keys, score = rng.standard_normal((2, 16)).astype(np.float16), rng.random(n, dtype=np.float32)
    return Block(int(rng.integers(2)), source, number, rng.integers(0, 9, n, dtype=np.int32), k, v, keys, score)


def write(folder: Path, engine: str, seed: int, tell) -> None:
    """Change the store until killed; `tell` of each step before and after."""
    draw = random.Random(seed)
    tell(f"begin open {seed}")
    with open_store(
        folder, engine=engine, mode="a", sync=draw.choice(["block", "second", "close"]), publish=0
    ) as store:
        tell("end")
        number = seed * 10**6
        while True:
            what, source = draw.choices(["put", "note", "delete", "compact"], [20, 3, 1, 1])[0], draw.choice(SOURCES)
            if what == "put":
                size = draw.choice([1, 1, 4, 30])
                tell(f"begin put {source} {number} {size}")
                store.put([made(i, source) for i in range(number, number + size)])
                number += size
            elif what == "note":
                tell(f"begin note {source} {number}")
                store.note(source, at=number)
            elif what == "delete" and source in store.sources():
                tell(f"begin delete {source} {number}")
                store.delete(source)
            else:
                tell("begin compact")
                store.compact()
            tell("end")


Content = tuple[dict[int, str], dict[str, int]]  # the sources of the blocks by number, and the notes by source


def after(content: Content, step: str) -> Content:
    blocks, notes = dict(content[0]), dict(content[1])
    match step.split():
        case "put", source, first, size:
            blocks |= dict.fromkeys(range(int(first), int(first) + int(size)), source)
        case "note", source, number:
            notes[source] = int(number)
        case "delete", source, _:
            blocks = {number: of for number, of in blocks.items() if of != source}
            notes.pop(source, None)
    return blocks, notes


def read(folder: Path) -> Content:
    """What is in the store; asserts that each block of it is as it was put, and that search finds it."""
    blocks: dict[int, str] = {}
    with open_store(folder) as store:
        counts = Counter()
        for block in store.scan():
            assert encode(block) == encode(with_id(made(block.start, block.source), block.id))
            assert block.start not in blocks
            blocks[block.start] = block.source
            counts[block.source] += 1
        found = store.search(0, np.ones((1, 16), np.float32), 10**4, generation=store.pin()).id[0]
        found1 = store.search(1, np.ones((1, 16), np.float32), 10**4, generation=store.pin()).id[0]
        ids = sorted([*found[found >= 0].tolist(), *found1[found1 >= 0].tolist()])
        assert {block.start for block in store.get(ids)} == blocks.keys()
        sources = store.sources()
        assert {name: facts["blocks"] for name, facts in sources.items() if facts["blocks"]} == counts
        return blocks, {name: facts["at"] for name, facts in sources.items() if "at" in facts}


def kill_one(folder: Path, engine: str, seed: int, before: Content) -> tuple[Content, str]:
    """What the store has after the writer with this seed was killed, and what it was doing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        write(folder, engine, seed, lambda step: os.write(writing, step.encode() + b"\n"))
    os.close(writing)
    told = os.fdopen(reading)
    assert told.readline()
    time.sleep(random.Random(-seed).uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content, doing = before, "open"
    for line in told.read().splitlines():
        if line == "end":
            content, doing = after(content, doing), ""
        else:
            doing = line.removeprefix("begin ")
    if doing == "open" and not (folder / "meta.json").exists():
        return before, doing
    if doing.startswith("open") or doing == "":
        with open_store(folder, engine=engine, mode="a"):  # finishes a store that was being made
            pass
    left = read(folder)
    assert left in (content, after(content, doing)), (doing, seed)
    return left, doing.split()[0] if doing else "nothing"


def main() -> None:
    folder, engine, first, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    interrupted: Counter[str] = Counter()
    content: Content = {}, {}
    for seed in range(first, first + kills):
        if seed % ONE_STORE == 0:
            shutil.rmtree(folder, ignore_errors=True)
            content = {}, {}
        content, doing = kill_one(folder, engine, seed, content)
        interrupted[doing] += 1
        if seed % ONE_STORE == ONE_STORE - 1 or seed == first + kills - 1:
            assert verify(folder).problems == []
    print(dict(interrupted))


if __name__ == "__main__":
    main()
