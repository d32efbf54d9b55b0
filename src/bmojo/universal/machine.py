"""Universal machines whose programs are drawn lazily, one instruction each time the machine asks for one.

A program is an infinite sequence of instructions, each of A equally likely. The machine executes it from the left and
asks for the next instruction when it needs one, so a run is a path in an A-ary tree, and the probability that it passes
a node after l instructions is A^-l. `Machine` is what tables, search and samples know of a machine; the classes here
are plain Python, exact and slow: the oracle of the compiled forms.

Source of the lazy form: Grau-Moya et al. 2024, Learning Universal Predictors, arXiv 2401.14953.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bmojo.errors import UniversalError, nearest

Outcome = Literal["request", "full", "loop", "timeout"]
UNSET = -1
MOST_STEPS = 2**62


def require(name: str, value: int, least: int, most: int) -> None:
    """Raises UniversalError unless least <= value <= most."""
    if not least <= value <= most:
        raise UniversalError(f"{name} must be from {least} to {most:,}, got {value:,}")


class Run(NamedTuple):
    """What a machine did: the state it is in, the bits it printed, the steps it took, and why it stopped.

    "request": it asks for an instruction. "full": it has printed as many bits as there was room for. "loop": it was
    seen twice in one configuration with nothing printed between, so it never prints again. "timeout": it is still
    running when its steps are used up.
    """

    state: Any
    bits: tuple[int, ...]
    steps: int
    outcome: Outcome


class Machine(ABC):
    """A machine with one-way input of instructions and one-way output of bits. States are hashable values."""

    name: str
    instructions: str

    @property
    def size(self) -> int:
        """A, the number of instructions."""
        return len(self.instructions)

    @property
    def identity(self) -> str:
        """What a table says it was made with: all that the machine's behaviour depends on."""
        return f"{self.name} {self.instructions}"

    @abstractmethod
    def start(self) -> Any:
        """The state in which the machine asks for its first instruction."""

    @abstractmethod
    def extend(self, state: Any, instruction: str) -> Any:
        """The state in which this instruction, asked for by `state`, is about to be executed."""

    @abstractmethod
    def run(self, state: Any, steps: int, room: int) -> Run:
        """Executes up to `steps` steps, until it asks for an instruction or has printed `room` bits (1 or more)."""

    def merged(self, state: Any) -> Any:
        """A state with the same future as this one, which asks for an instruction; the simplest that is known."""
        return state


class State(NamedTuple):
    """`code` as written so far; where its brackets jump; the open ones, innermost last; the next place in the code."""

    code: str
    jumps: tuple[int, ...]
    opened: tuple[int, ...]
    at: int
    tape: int


@dataclass(frozen=True)
class BrainPhoque(Machine):
    """BrainPhoque over bits: a ring of `cells` one-bit cells, all 0 at the start, and a head on one of them.

        +  -    flip the cell (with bits, adding and taking away one are the same)
        >  <    move the head to the next or the previous cell of the ring
        [       with 0 in the cell: on behind the matching ]; else on with the body
        ]       back to the matching [; nothing if no bracket is open
        .       print the cell

    Brackets are written so that whatever is drawn is executed at once. A '[' drawn over a 1 is followed by its body,
    and its continuation is drawn when the loop first ends. A '[' drawn over a 0 becomes a '{', which is followed by its
    continuation, and its body is drawn when the bracket is first met over a 1. A drawn ']' closes the innermost bracket
    whose body is being drawn. There is no instruction to stop and none for input.

    Every executed instruction is one step, the drawn one included. The tape is an integer whose bit 0 is the cell under
    the head: to move the head is to rotate it, and two tapes that differ by a rotation of the ring are one.

    Certificate of a loop: after 1, 2, 4, 8, ... steps since the last instruction was asked for, the configuration
    (place in the code, tape seen from the head) is noted, and forgotten when a bit is printed; the machine loops if it
    comes back to it. A silent cycle too long for that within the steps allowed counts as a time-out.

    Where no bracket is open nothing that was written can be reached again: `merged` forgets it.

    The published machine has 7 instructions and, in the authors' demonstration, cells modulo the output alphabet (9
    there, 2 here), a ring of 10 cells, and a limit of 100 steps on the whole run.
    """

    name: str
    instructions: str
    cells: int = 32

    def __post_init__(self) -> None:
        if len(self.instructions) < 2 or set(self.instructions) - set("+-><[]."):
            raise UniversalError(f"instructions must be two or more of + - > < [ ] . , got {self.instructions!r}")
        require("cells", self.cells, 1, 62)

    @property
    def identity(self) -> str:
        return f"{self.name} {self.instructions} on {self.cells} cells"

    def start(self) -> State:
        return State("", (), (), 0, 0)

    def extend(self, state: State, instruction: str) -> State:
        code, jumps, opened, at, tape = state
        jump = UNSET
        if instruction == "[":
            if tape & 1:
                opened += (at,)
            else:
                instruction = "{"
        elif instruction == "]" and opened:
            *others, jump = opened
            opened = tuple(others)
        return State(code + instruction, (*jumps, jump), opened, at, tape)

    def run(self, state: State, steps: int, room: int) -> Run:
        code, jumped, opened, at, tape = state
        jumps, bits, taken, noted = list(jumped), [], 0, None
        outcome: Outcome = "request"
        while at < len(code):
            if noted == (at, tape):
                outcome = "loop"
                break
            if taken == steps:
                outcome = "timeout"
                break
            if taken and taken & (taken - 1) == 0:
                noted = at, tape
            taken += 1
            instruction = code[at]
            here, at = at, at + 1
            if instruction in "+-":
                tape ^= 1
            elif instruction == ">":
                tape = tape >> 1 | (tape & 1) << (self.cells - 1)
            elif instruction == "<":
                tape = (tape << 1) & ((1 << self.cells) - 1) | tape >> (self.cells - 1)
            elif instruction == ".":
                bits.append(tape & 1)
                noted = None
                if len(bits) == room:
                    outcome = "full"
                    break
            elif instruction == "]":
                if jumps[here] != UNSET:
                    at = jumps[here]
            elif (tape & 1) != (instruction == "["):  # on to the part that does not follow the bracket
                if jumps[here] == UNSET:
                    jumps[here] = len(code)
                    if instruction == "{":
                        opened += (here,)
                at = jumps[here]
        return Run(State(code, tuple(jumps), opened, at, tape), tuple(bits), taken, outcome)

    def merged(self, state: State) -> State:
        return state if state.opened else State("", (), (), 0, state.tape)


MACHINES: dict[str, Machine] = {
    "bp7": BrainPhoque("bp7", "+-><[]."),
    "bp6": BrainPhoque("bp6", "+><[]."),
}


def get_machine(machine: str | Machine) -> Machine:
    """The machine of this name; UniversalError for an unknown one. A machine of one's own is passed on as it is."""
    if isinstance(machine, Machine):
        return machine
    if machine not in MACHINES:
        raise UniversalError(f"unknown machine {machine!r}; {nearest(machine, MACHINES)}")
    return MACHINES[machine]
