"""Solomonoff's mixture on short bit strings, truncated in program length and time, and exact in integers.

    M(x)       = sum over programs p that print x first with their last instruction of A^-l(p)
    M_{D,T}(x) = the same over programs of at most D instructions, T steps between two of them
    M_norm(b|x) = M(xb) / (M(x0) + M(x1))

M is a semimeasure, M(x0) + M(x1) <= M(x): some programs never print again. Its normalised form M_norm is the predictor,
and a measure on strings of n bits by the chain rule. Where the table has no program (M(x0) = M(x1) = 0), M_norm is 1/2.

Source: Solomonoff 1964 and 1978; the lazy programs, Grau-Moya et al. 2024, arXiv 2401.14953.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bmojo.errors import UniversalError
from bmojo.files import optional_module
from bmojo.universal.compiled import HAS_NUMBA
from bmojo.universal.enumeration import Counts, Progress, count, count_plainly, read_arrays, write_arrays
from bmojo.universal.machine import MOST_STEPS, BrainPhoque, Machine, get_machine, require

FORMAT = 1
MOST_BITS = 20  # 20 + 1 bits of output, 32 of tape, 5 + 2 of the rest are a key
PLAIN_DEPTH = 6  # to which depth plain Python is an answer where numba is missing

String = str | np.ndarray | list[int] | tuple[int, ...]


def bits_of(x: String) -> str:
    """A string of bits, given as text or as numbers; UniversalError for anything else."""
    bits = list(map(str, x)) if isinstance(x, Iterable) else [str(x)]
    if not isinstance(x, Iterable) or set(bits) - {"0", "1"}:
        raise UniversalError(f"a string must be of bits, 0 and 1, got {x!r}")
    return "".join(bits)


class Conditional(NamedTuple):
    """P(1 | x) by M_norm; the interval in which M(x1) / (M(x0) + M(x1)) of the machine without limits lies; whether the
    table knows a program that goes on behind x (if not, `one` is 1/2)."""

    one: float
    lower: float
    upper: float
    supported: bool


@dataclass(eq=False)
class SolomonoffTable:
    """M_{D,T} of a machine on all strings to `n_bits` bits, D = `depth`, T = `steps`; made by `build` or `load`.

    All counts are integers in units of A^-D, below 2^63.
    """

    machine: str
    identity: str
    size: int
    n_bits: int
    depth: int
    steps: int
    counts: Counts

    @classmethod
    def build(
        cls,
        machine: str | Machine = "bp7",
        n_bits: int = 16,
        depth: int = 13,
        steps: int = 1024,
        *,
        checkpoint: str | Path | None = None,
        threads: int = 2,
        progress: Progress | None = None,
    ) -> SolomonoffTable:
        """Walk all programs of up to `depth` instructions, each run for up to `steps` steps from one to the next.

        `checkpoint` is a file written as each layer of depth is done; with it the same build goes on after any end of
        the process, to the identical table. `threads` walk at a time (numba frees the interpreter's lock).
        `progress(layers done, nodes)` is called as more is done.

        Raises UniversalError for settings out of range (A^depth must be below 2^63) and for a checkpoint of other
        settings; MissingPackageError where numba is missing and depth above 6.
        """
        machine = get_machine(machine)
        deepest = next((d for d in range(63) if machine.size ** (d + 1) >= 2**63), 63)
        require("n_bits", n_bits, 1, MOST_BITS)
        require(f"depth (of {machine.size} instructions, as counts are integers below 2^63)", depth, 1, deepest)
        require("steps", steps, 1, MOST_STEPS)
        require("threads", threads, 1, 4096)
        if isinstance(machine, BrainPhoque) and (HAS_NUMBA or depth > PLAIN_DEPTH):
            optional_module("numba", f"a table of depth above {PLAIN_DEPTH}", "universal")
            path = None if checkpoint is None else Path(checkpoint)
            counts = count(machine, n_bits, depth, steps, checkpoint=path, threads=threads, progress=progress)
        else:
            counts = count_plainly(machine, n_bits, depth, steps)
        return cls(machine.name, machine.identity, machine.size, n_bits, depth, steps, counts)

    def save(self, path: str | Path) -> None:
        """Write an .npz with the counts and what they are of."""
        settings = {name: getattr(self, name) for name in ("machine", "identity", "size", "n_bits", "depth", "steps")}
        write_arrays(
            Path(path),
            {
                "settings": json.dumps({"format": FORMAT, **settings}),
                "first": self.counts.first,
                "loops": self.counts.loops,
                "timeouts": self.counts.timeouts,
                "depth": np.array(self.counts.depth),
            },
        )

    @classmethod
    def load(cls, path: str | Path, **expected: Any) -> SolomonoffTable:
        """A saved table; UniversalError if it is damaged, or its machine, n_bits, depth or steps not as `expected`."""
        if "machine" in expected:
            expected["identity"] = get_machine(expected.pop("machine")).identity
        with read_arrays(Path(path), "table", {"format": FORMAT, **expected}) as arrays:
            settings = json.loads(str(arrays["settings"]))
            del settings["format"]
            counts = Counts(arrays["first"], arrays["loops"], arrays["timeouts"], int(arrays["depth"]))
            table = cls(**settings, counts=counts)
            for array, places in ((counts.first, 2), (counts.loops, 1), (counts.timeouts, 1)):
                if array.dtype != np.uint64 or array.shape != (places << table.n_bits,):
                    raise ValueError(f"{array.dtype} {array.shape}")
        if sum(table.mass().values()) != table.total:
            raise UniversalError(
                f"{path} is a damaged table: its mass is {sum(table.mass().values())} of {table.total}"
            )
        return table

    @property
    def total(self) -> int:
        """A^D, the unit of mass."""
        return self.size**self.depth

    def _index(self, x: String, most: int) -> int:
        """The integer of a string with a leading one."""
        bits = bits_of(x)
        if len(bits) > most:
            raise UniversalError(f"the table of {self.n_bits} bits answers for up to {most} bits here, got {len(bits)}")
        return int("1" + bits, 2)

    def count(self, x: String) -> int:
        """M(x) in units of A^-D: the programs of length D that print x, or x and more."""
        return int(self.counts.first[self._index(x, self.n_bits)])

    def levels(self) -> list[np.ndarray]:
        """For t = 0 .. n_bits the counts of all strings of t bits in lexicographic order, uint64 [2^t]."""
        return [self.counts.first[1 << t : 2 << t] for t in range(self.n_bits + 1)]

    @cached_property
    def _cut(self) -> np.ndarray:
        """By output, int64 [2^n_bits]: programs cut off at the depth limit having printed just that."""
        first = self.counts.first.astype(np.int64)
        size = len(first) // 2
        ended = first[: 2 * size].reshape(-1, 2).sum(1) + (self.counts.loops + self.counts.timeouts).astype(np.int64)
        cut = first[:size] - ended
        cut[0] = 0
        return cut

    def mass(self, x: String | None = None) -> dict[str, int]:
        """Where all mass goes, in units of A^-D; sums to A^D.

        "hit" prints n_bits bits (or, given x, prints x); "mismatch" prints something else than x (0 if none is given);
        "loop" never prints again; "timeout" was cut off after T steps; "depth" after D instructions.
        """
        if x is None:
            hit = int(self.counts.first[1 << self.n_bits :].sum())
            loop, timeout = int(self.counts.loops.sum()), int(self.counts.timeouts.sum())
            return {"hit": hit, "mismatch": 0, "loop": loop, "timeout": timeout, "depth": self.counts.depth}
        index = self._index(x, self.n_bits)
        on = [index >> n for n in range(1, index.bit_length())]  # the proper prefixes, longest first
        off = [(index >> n) ^ 1 for n in range(index.bit_length() - 1)]
        kinds = (self.counts.first, off), (self.counts.loops, on), (self.counts.timeouts, on), (self._cut, on)
        masses = [int(counts[places].sum()) for counts, places in kinds]
        return dict(zip(("hit", "mismatch", "loop", "timeout", "depth"), [self.count(x), *masses], strict=True))

    def bounds(self, x: String) -> tuple[int, int]:
        """L <= M(x) A^D <= U for the machine without limits: L counts programs that print x, U adds those cut off (in
        depth or time) having printed the beginning of x."""
        mass = self.mass(x)
        return mass["hit"], mass["hit"] + mass["timeout"] + mass["depth"]

    def conditional(self, x: String) -> Conditional:
        """What M says of the bit behind x, fewer than n_bits bits; bounds by L and U of `bounds`."""
        index = self._index(x, self.n_bits - 1)
        bits = f"{index:b}"[1:]
        (low0, high0), (low1, high1) = self.bounds(bits + "0"), self.bounds(bits + "1")
        known = low0 + low1
        return Conditional(
            one=low1 / known if known else 0.5,
            lower=low1 / (low1 + high0) if low1 + high0 else 0.0,
            upper=high1 / (high1 + low0) if high1 + low0 else 1.0,
            supported=known > 0,
        )

    @cached_property
    def predictions(self) -> list[np.ndarray]:
        """For t = 0 .. n_bits - 1, M_norm(1 | x) of all strings x of t bits in lexicographic order, float64 [2^t]."""
        pairs = [level.reshape(-1, 2).astype(np.float64) for level in self.levels()[1:]]
        known = [pair.sum(1) for pair in pairs]
        return [
            np.divide(pair[:, 1], mass, out=np.full(len(mass), 0.5), where=mass > 0)
            for pair, mass in zip(pairs, known, strict=True)
        ]

    @cached_property
    def measures(self) -> list[np.ndarray]:
        """For t = 0 .. n_bits, M_norm of all strings of t bits in lexicographic order, float64 [2^t], sums to 1."""
        return _measures(self.predictions)

    @property
    def measure(self) -> np.ndarray:
        """M_norm of all strings of n_bits bits."""
        return self.measures[-1]

    def log2_probability(self, x: String) -> float:
        """log2 M_norm(x), at most n_bits bits; finite only if M_norm(x) > 0."""
        index = self._index(x, self.n_bits)
        length = index.bit_length() - 1
        with np.errstate(divide="ignore"):
            return float(np.log2(self.measures[length][index - (1 << length)]))

    def entropy(self) -> float:
        """Of M_norm over strings of n_bits bits, in bits: n_bits less the gap of the uniform predictor."""
        known = self.measure[self.measure > 0]
        return float(-(known * np.log2(known)).sum())

    def divergence(self, other: SolomonoffTable, uniform: float = 1e-3) -> float:
        """KL(M_norm || q) in bits over strings of n_bits bits, where q predicts (1 - uniform) M_norm'(1 | x) +
        uniform / 2 with the M_norm' of another table, so that q is nowhere 0. Not 0 for the table itself."""
        if other.n_bits != self.n_bits:
            raise UniversalError(f"a table of {self.n_bits} bits can't be set against one of {other.n_bits}")
        *_, q = _measures([(1 - uniform) * one + uniform / 2 for one in other.predictions])
        at = self.measure > 0
        return float((self.measure[at] * np.log2(self.measure[at] / q[at])).sum())

    def coverage(self) -> list[int]:
        """For t = 0 .. n_bits, how many of the 2^t strings some program prints."""
        return [int(np.count_nonzero(level)) for level in self.levels()]

    def top(self, k: int, length: int | None = None) -> list[tuple[str, float]]:
        """The k most probable strings of `length` bits (n_bits if None) with M(x), most probable first."""
        length = self.n_bits if length is None else length
        require("length", length, 0, self.n_bits)
        counts = self.levels()[length]
        best = np.argsort(counts, kind="stable")[::-1][:k]
        return [(f"{x + (1 << length):b}"[1:], int(counts[x]) / self.total) for x in best]


def _measures(predictions: list[np.ndarray]) -> list[np.ndarray]:
    """Of the strings of each length, the measure that has these P(1 | x)."""
    measures = [np.ones(1)]
    for one in predictions:
        measures.append((measures[-1][:, None] * np.stack([1 - one, one], axis=1)).ravel())
    return measures
