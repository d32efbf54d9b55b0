"""Programs executed in increasing length, dovetailed: Levin's search, and Schmidhuber's speed prior.

In phase i = 1, 2, 3, ... every program of l instructions is run for 2^i A^-l steps in all, so that each phase spends
about 2^i steps a length and a program counts with Kt(p) = l log2 A + log2(steps), the bits of its text and of its time.

Two things that are easily taken for one another: the *first hit* of that order, `levin_search`, is one program that
prints all of the data, the best single explanation. *Solomonoff's mixture*, `SolomonoffTable`, is the sum over all
programs that do, and is what predicts: its weight on the data is at least that of the first hit, often much more, and
the other programs disagree about what comes next. `speed_prior` is a mixture too, in which slow programs weigh less.

Source: Levin 1973; Schmidhuber 2002, The Speed Prior (COLT 2002).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bmojo.errors import UniversalError
from bmojo.universal.compiled import uses_numba
from bmojo.universal.machine import BrainPhoque, Machine, get_machine, require
from bmojo.universal.table import MOST_BITS, String, bits_of

MOST_PHASES = 62  # costs are integers below 2^63


@dataclass(frozen=True)
class LevinSearch:
    """What a search found: the program whose Kt is least, or None if there is none within the phases.

    `steps` are those until its last bit, `phase` is the last phase that was executed; every program that prints the
    data and has Kt(p) <= phase was executed. `nodes` and `spent` (steps) are what all phases cost together.
    """

    data: str
    machine: str
    size: int
    phase: int
    nodes: int
    spent: int
    program: str | None = None
    steps: int = 0

    @property
    def length(self) -> int:
        """Of the program, in instructions."""
        return len(self.program or "")

    @property
    def bits(self) -> float:
        """Of the program: length * log2 A."""
        return self.length * math.log2(self.size)

    @property
    def kt(self) -> float:
        """Levin's Kt of the data, in bits: bits + log2(steps); infinite if no program was found."""
        return math.inf if self.program is None else self.bits + math.log2(self.steps)


def levin_search(
    data: String,
    machine: str | Machine = "bp7",
    max_phase: int = 30,
    progress: Callable[[LevinSearch], None] | None = None,
) -> LevinSearch:
    """The program of least Kt that prints the data (and then whatever it likes).

    Phases are executed up to the first one with a hit, which holds every program with Kt <= phase, so the best of its
    hits is the best of all: `kt` is Levin's Kt(data) for this machine, exactly. Of equals the shortest is taken, and of
    those the first in the order of the machine's instructions. `max_phase` is the budget: a phase costs at most about
    max_phase * 2^phase / log2 A steps, less the more programs print something else. `progress` is called with what is
    known after each phase.

    Raises UniversalError for data that are no bits, or empty, and for a budget out of range.
    """
    machine, bits = get_machine(machine), bits_of(data)
    if not bits:
        raise UniversalError("there is nothing to search for: give at least one bit")
    require("max_phase", max_phase, 1, MOST_PHASES)
    found = LevinSearch(bits, machine.name, machine.size, 0, 0, 0)
    for phase, (hit, nodes, spent) in enumerate(_searched(machine, bits, max_phase), 1):
        found = replace(found, phase=phase, nodes=found.nodes + nodes, spent=found.spent + spent)
        if hit is not None:
            found = replace(found, program=hit.program, steps=hit.steps)
        if progress is not None:
            progress(found)
        if hit is not None:
            break
    return found


@dataclass(frozen=True)
class SpeedPrior:
    """Schmidhuber's S of all strings to `n_bits` bits, by the phases of FAST up to `phases`.

        S(x) = sum_i 2^-i S_i(x),    S_i(x) = sum of A^-l(p) over programs p that first print x within phase i

    where a program of l instructions has 2^i A^-l steps in phase i. `levels[t]` float64 [2^t] is that sum to
    i = `phases`, in lexicographic order of the strings of t bits; what is missing is less than 2^-phases.
    """

    machine: str
    n_bits: int
    phases: int
    levels: list[np.ndarray]

    def bounds(self, x: String) -> tuple[float, float]:
        """An interval that holds S(x)."""
        bits = bits_of(x)
        if len(bits) > self.n_bits:
            raise UniversalError(f"the speed prior was asked for up to {self.n_bits} bits, got {len(bits)}")
        low = float(self.levels[len(bits)][int(bits or "0", 2)])
        return low, low + 2.0**-self.phases


def speed_prior(n_bits: int, phases: int, machine: str | Machine = "bp7") -> SpeedPrior:
    """The speed prior of all strings to `n_bits` bits; costs about phases * 2^phases / log2 A steps."""
    machine = get_machine(machine)
    require("phases", phases, 1, MOST_PHASES)
    require("n_bits", n_bits, 1, MOST_BITS)
    gains = np.array([2.0 ** (1 - i) - 2.0**-phases for i in range(phases + 1)])
    table = np.zeros(2 << n_bits)
    if isinstance(machine, BrainPhoque) and uses_numba("the speed prior"):
        _compiled(machine, np.full(n_bits, 2), phases, gains, table)
    else:
        for phase, (events, _, _) in enumerate(dovetailed(machine, phases, n_bits), 1):
            for event in events:
                table[int("1" + event.output, 2)] += gains[phase] * float(machine.size) ** -len(event.program)
    table[1] = gains[1]  # the empty string is printed by all programs, in every phase
    return SpeedPrior(machine.name, n_bits, phases, [table[1 << t : 2 << t] for t in range(n_bits + 1)])


class Event(NamedTuple):
    """A program that first printed this output after so many steps in all."""

    program: str
    output: str
    steps: int


def dovetailed(
    machine: Machine, phases: int, n_bits: int, data: str | None = None
) -> Iterator[tuple[list[Event], int, int]]:
    """What programs print new in each phase, the nodes met there, and the steps taken: plain Python for any machine,
    from one frontier of unfinished programs.

    Outputs of up to n_bits bits; with `data`, programs that print something else are dropped.
    """
    frontier: list[tuple[str, Any, int, str, bool]] = [("", machine.start(), 0, "", True)]  # steps, output, whether
    for phase in range(1, phases + 1):  # it asks for an instruction
        events, nodes, spent = [], 0, 0
        work, frontier = frontier[::-1], []
        while work:
            program, state, steps, output, asks = work.pop()
            left = 2**phase // machine.size ** (len(program) + asks) - steps
            if left <= 0:
                frontier.append((program, state, steps, output, asks))
            elif asks:
                nodes += machine.size
                for instruction in reversed(machine.instructions):
                    work.append((program + instruction, machine.extend(state, instruction), steps, output, False))
            else:
                run = machine.run(state, left, 1)
                steps, spent = steps + run.steps, spent + run.steps
                if run.outcome == "full":
                    output += str(run.bits[0])
                    if data is not None and not data.startswith(output):
                        continue
                    events.append(Event(program, output, steps))
                    if len(output) == n_bits:
                        continue
                if run.outcome != "loop":
                    work.append((program, run.state, steps, output, run.outcome == "request"))
        yield events, nodes, spent


def _searched(machine: Machine, data: str, most: int) -> Iterator[tuple[Event | None, int, int]]:
    """For each phase the best program that prints the data, nodes, and steps."""
    if isinstance(machine, BrainPhoque) and uses_numba("a search"):
        wanted = np.array([int(bit) for bit in data])
        for phase in range(1, most + 1):
            program, steps, nodes, spent = _compiled(machine, wanted, phase, np.zeros(1), np.zeros(1))
            yield Event(program, data, steps) if program else None, nodes, spent
        return

    def order(event: Event) -> tuple[int, int, list[int]]:
        text = event.program
        return machine.size ** len(text) * event.steps, len(text), [machine.instructions.index(i) for i in text]

    for events, nodes, spent in dovetailed(machine, most, len(data), data):
        yield min((event for event in events if event.output == data), key=order, default=None), nodes, spent


def _compiled(
    machine: BrainPhoque, data: np.ndarray, phase: int, gains: np.ndarray, table: np.ndarray
) -> tuple[str, int, int, int]:
    """`program_tree.dovetail` with the steps of one phase; its program as text."""
    from bmojo.universal import program_tree

    ops, weights = program_tree.distinct(machine)
    costs = [machine.size**length for length in range(MOST_PHASES) if machine.size**length <= 2**phase]
    steps = np.array([2**phase // cost for cost in costs])
    if len(steps) == 1:
        return "", 0, 0, 0  # no time for a single instruction
    arguments = (machine.cells, ops, weights.astype(np.float64), np.array(costs), gains, steps, data, table)
    path, taken, nodes, spent = program_tree.dovetail(*arguments)
    first = {code: text for text, code in reversed(program_tree.CODES.items()) if text in machine.instructions}
    return "".join(first[int(ops[which])] for which in path), int(taken), nodes, spent
