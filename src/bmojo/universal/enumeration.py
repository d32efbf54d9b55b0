"""All programs to a depth, counted: what they print first, which loop, time out, or are cut off at the depth limit.

Programs of equal futures are walked once: where no bracket is open, what a program does next depends only on its tape,
and what it printed before matters only for how much room is left (`Machine.merged`). So a build goes by layers, one for
each number of instructions drawn: a layer is a map from (merged state, output) to how many programs are there.

`count_plainly` is that in plain Python for any machine; `count` is the same for BrainPhoque machines in numba, where
all programs from a tape to the next merge are walked once, whatever the layer and the output, and in several threads.
"""

from __future__ import annotations

import io
import itertools
import json
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.errors import UniversalError
from bmojo.files import write_whole
from bmojo.universal.machine import BrainPhoque, Machine

SAVE_EVERY = 30.0  # seconds
Bits = np.ndarray  # uint64 by output: the integer with a leading one before the bits
Progress = Callable[[int, int], None]  # the layers that are done, the nodes visited


@dataclass
class Counts:
    """How many of the A^depth programs of length `depth`, uint64 by output as an integer with a leading one.

    first [2^(n_bits+1)]: print it, or it and more. loops, timeouts [2^n_bits]: loop or time out having printed it and
    no more. depth: run on at the depth limit with less than n_bits printed, counted apart, not as what is left.
    """

    first: Bits
    loops: Bits
    timeouts: Bits
    depth: int = 0

    @classmethod
    def none(cls, n_bits: int) -> Counts:
        return cls(np.zeros(2 << n_bits, np.uint64), np.zeros(1 << n_bits, np.uint64), np.zeros(1 << n_bits, np.uint64))


def count_plainly(machine: Machine, n_bits: int, depth: int, steps: int) -> Counts:
    """The counts of any machine, in plain Python: for small depths, and to test `count` by."""
    counts = Counts.none(n_bits)
    counts.first[1] = machine.size**depth
    layer = Counter({(machine.merged(machine.start()), 1): 1})
    for left in reversed(range(depth)):
        unit = machine.size**left
        deeper: Counter[tuple[Any, int]] = Counter()
        for (state, output), programs in layer.items():
            for instruction in machine.instructions:
                room = n_bits + 1 - output.bit_length()
                run = machine.run(machine.extend(state, instruction), steps, room)
                reached = output
                for bit in run.bits:
                    reached = reached << 1 | bit
                    counts.first[reached] += np.uint64(programs * unit)
                if run.outcome == "request":
                    deeper[machine.merged(run.state), reached] += programs
                elif run.outcome == "loop":
                    counts.loops[reached] += np.uint64(programs * unit)
                elif run.outcome == "timeout":
                    counts.timeouts[reached] += np.uint64(programs * unit)
        layer = deeper
    counts.depth = sum(layer.values())
    return counts


def count(
    machine: BrainPhoque,
    n_bits: int,
    depth: int,
    steps: int,
    *,
    checkpoint: Path | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Counts:
    """The counts of a BrainPhoque machine. With `checkpoint`, what is done is written there after each layer (and twice
    a minute within one), and a build that was interrupted goes on from it.

    Raises UniversalError for a checkpoint of other settings, and where a key does not fit in 63 bits.
    """
    if machine.cells + n_bits > 55 or depth > 31:
        raise UniversalError(
            "a table holds cells and bits of together at most 55, and a depth of at most 31, "
            f"got {machine.cells} + {n_bits} and {depth}"
        )
    build = _Build(machine, n_bits, depth, steps)
    if checkpoint is not None and checkpoint.exists():
        build.restore(checkpoint)
    saved = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for layer_done in build.run(pool):
                if checkpoint is not None and (layer_done or time.monotonic() - saved > SAVE_EVERY):
                    build.save(checkpoint)
                    saved = time.monotonic()
                if progress is not None:
                    progress(build.layer, build.nodes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return build.counts


Counter64 = tuple[np.ndarray, np.ndarray]  # int64 keys, sorted, and uint64 counts


@dataclass
class _Expansion:
    """What `program_tree.expand` counts from one tape: its counter, and the nodes with open brackets by instructions
    and bits printed."""

    keys: np.ndarray
    counts: np.ndarray
    still_open: np.ndarray

    def of(self, what: int, drawn: int, shift: int) -> Counter64:
        """What happened so after this many instructions, by tape and output."""
        key = (what << 5 | drawn) << shift
        low, high = np.searchsorted(self.keys, [key, key + (1 << shift)])
        return self.keys[low:high] - key, self.counts[low:high]


class _Build:
    """A build: which layers are done, what they count, and what they leave to the next ones. All of it is saved.

    `waiting` has, for each layer to come, the merged states there: tape << (n_bits + 1) | output, and how many programs
    lead to it. `expansions` has for each tape met what follows from it; those that this layer adds are complete when
    `tasks` tasks of it are done.
    """

    def __init__(self, machine: BrainPhoque, n_bits: int, depth: int, steps: int) -> None:
        self.machine, self.n_bits, self.depth, self.steps = machine, n_bits, depth, steps
        self.layer = self.tasks = self.nodes = 0
        self.counts = Counts.none(n_bits)
        self.counts.first[1] = machine.size**depth
        self.waiting: dict[int, list[Counter64]] = {layer: [] for layer in range(depth + 1)}
        self.waiting[0] = [(np.array([1]), np.array([1], np.uint64))]
        self.expansions: dict[int, _Expansion] = {}
        self.unmerged: dict[int, list[_Expansion]] = {}

    def run(self, pool: ThreadPoolExecutor) -> Iterator[bool]:
        """All that is left to do, with a pause after each task (False) and each layer (True)."""
        while self.layer < self.depth:
            for _ in self._walk(pool):
                yield False
            self._spread()
            yield True

    def _walk(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Expands the tapes that are new in this layer, a task at a time: long walks are cut by their first
        instructions."""
        from bmojo.universal import program_tree

        left = self.depth - self.layer
        tapes = np.unique(_sum(self.waiting[self.layer])[0] >> (self.n_bits + 1)).tolist()
        new = [t for t in tapes if t not in self.expansions or len(self.expansions[t].still_open) == left + 1]
        ops, weights = program_tree.distinct(self.machine)
        cut = min(max(left - 8, 0), 6)
        prefixes = list(itertools.product(range(len(ops)), repeat=cut))
        tasks = [(tape, left, prefix) for tape in new for prefix in prefixes]
        if cut:
            tasks += [(tape, cut, ()) for tape in new]

        def walk(tape: int, depth: int, prefix: tuple[int, ...]) -> Any:
            first = np.array(prefix, np.int64)
            return program_tree.expand(tape, self.machine.cells, ops, weights, depth, self.steps, self.n_bits, first)

        todo = tasks[self.tasks :]
        for (tape, *_), found in zip(todo, pool.map(walk, *zip(*todo, strict=True)) if todo else (), strict=True):
            keys, counts, still_open, nodes = found
            padded = np.zeros((left + 1, self.n_bits), np.uint64)
            padded[: len(still_open)] = still_open
            self.unmerged.setdefault(tape, []).append(_Expansion(keys, counts, padded))
            self.tasks, self.nodes = self.tasks + 1, self.nodes + nodes
            yield

    def _spread(self) -> None:
        """Adds what all programs of this layer do until the next merge, and goes on to the next layer."""
        from bmojo.universal import program_tree

        self._merge()
        left = self.depth - self.layer
        over, shift = self.n_bits + 1, self.n_bits + 1 + self.machine.cells
        keys, counts = _sum(self.waiting[self.layer])
        tapes, begins = np.unique(keys >> over, return_index=True)
        for tape, (begin, end) in zip(tapes.tolist(), itertools.pairwise([*begins, len(keys)]), strict=True):
            expansion = self.expansions[tape]
            outputs, programs = keys[begin:end] & ((1 << over) - 1), counts[begin:end]
            for drawn in range(1, left + 1):
                scaled = programs * np.uint64(self.machine.size ** (left - drawn))
                for what, most, table in (
                    (program_tree.FIRST, self.n_bits, self.counts.first),
                    (program_tree.LOOPED, self.n_bits - 1, self.counts.loops),
                    (program_tree.LATE, self.n_bits - 1, self.counts.timeouts),
                ):
                    program_tree.spread(outputs, scaled, *expansion.of(what, drawn, shift), most, table)
                ended = expansion.of(program_tree.ENDED, drawn, shift)
                self.waiting[self.layer + drawn].append(program_tree.follow(outputs, programs, *ended, self.n_bits))
            lengths = np.frexp(outputs)[1] - 1
            open_now = expansion.still_open[left].cumsum()  # by the most that may have been printed since
            self.counts.depth += int((programs * open_now[self.n_bits - 1 - lengths]).sum())
        self.waiting[self.layer] = []
        self.layer, self.tasks = self.layer + 1, 0
        if self.layer == self.depth:
            self.counts.depth += int(_sum(self.waiting[self.depth])[1].sum())
            self.expansions = {}

    def _merge(self) -> None:
        for tape, parts in self.unmerged.items():
            parts = [*parts, self.expansions[tape]] if tape in self.expansions else parts
            counter = _sum([(part.keys, part.counts) for part in parts])
            self.expansions[tape] = _Expansion(*counter, np.sum([part.still_open for part in parts], axis=0))
        self.unmerged = {}

    def _settings(self) -> dict[str, Any]:
        return {"machine": self.machine.identity, "n_bits": self.n_bits, "depth": self.depth, "steps": self.steps}

    def save(self, path: Path) -> None:
        self._merge()
        arrays: dict[str, Any] = {
            "settings": json.dumps(self._settings()),
            "progress": np.array([self.layer, self.tasks, self.nodes, self.counts.depth]),
            **{name: getattr(self.counts, name) for name in ("first", "loops", "timeouts")},
        }
        for layer, parts in self.waiting.items():
            arrays[f"keys {layer}"], arrays[f"counts {layer}"] = _sum(parts)
        for tape, expansion in self.expansions.items():
            arrays[f"keys of {tape}"], arrays[f"counts of {tape}"] = expansion.keys, expansion.counts
            arrays[f"open {tape}"] = expansion.still_open
        write_arrays(path, arrays)

    def restore(self, path: Path) -> None:
        with read_arrays(path, "checkpoint", self._settings()) as arrays:
            self.layer, self.tasks, self.nodes, self.counts.depth = arrays["progress"].tolist()
            for name in ("first", "loops", "timeouts"):
                setattr(self.counts, name, arrays[name])
            self.waiting = {n: [(arrays[f"keys {n}"], arrays[f"counts {n}"])] for n in range(self.depth + 1)}
            for tape in [name.removeprefix("open ") for name in arrays if name.startswith("open ")]:
                self.expansions[int(tape)] = _Expansion(
                    arrays[f"keys of {tape}"], arrays[f"counts of {tape}"], arrays[f"open {tape}"]
                )


def _sum(parts: list[Counter64]) -> Counter64:
    """One counter with the sums of several, its keys sorted."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    keys, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    begins = np.flatnonzero(np.diff(keys, prepend=-1))
    return (keys[begins], np.add.reduceat(counts, begins)) if len(keys) else (keys, counts)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz, written whole or not at all; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


@contextmanager
def read_arrays(path: Path, kind: str, expected: dict[str, Any]) -> Iterator[Any]:
    """The arrays of an .npz; UniversalError if it is no such file or was made with other settings than `expected`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            settings = dict(json.loads(str(arrays["settings"])))
            other = [
                f"{name} {settings.get(name)!r} there, {value!r} asked for"
                for name, value in expected.items()
                if settings.get(name) != value
            ]
            if other:
                differ = "; ".join(other)
                raise UniversalError(
                    f"{path} is a {kind} of other settings: {differ}; ask for those, take another path, or delete it"
                )
            yield arrays
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, TypeError) as error:
        if isinstance(error, UniversalError):
            raise
        raise UniversalError(f"{path} is no {kind} of bmojo, or is damaged; delete it and make it again") from error
