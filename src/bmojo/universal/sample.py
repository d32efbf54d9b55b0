"""What random programs print: universal training data, and Monte-Carlo samples of Solomonoff's mixture."""

from __future__ import annotations

import numpy as np

from bmojo.errors import UniversalError
from bmojo.universal.compiled import uses_numba
from bmojo.universal.machine import MOST_STEPS, BrainPhoque, Machine, get_machine, require

_PATIENCE = 2**22  # programs without a long enough output among them


def sample_outputs(
    draw: np.random.Generator,
    rows: int,
    machine: str | Machine = "bp7",
    n_bits: int = 64,
    depth: int = 64,
    steps: int = 1024,
    at_least: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of programs drawn at random: bits uint8 [rows, n_bits], 0 behind the end; how many, int64 [rows].

    Every instruction is each of the machine's with the same probability. An output ends with n_bits bits, where its
    program loops, takes more than `steps` steps from one instruction to the next, or would need one more than `depth`.
    So with at_least = 0 the probability that an output starts with x is M_{D,T}(x) of a table with D = depth and
    T = steps. Programs that print fewer than `at_least` bits are passed over and others drawn in their place, which
    conditions on printing that many.

    The cross-entropy of next bits that are printed, in expectation over these outputs, is least for
    P(1 | x) = M(x1) / (M(x0) + M(x1)): the table's M_norm, for at_least of 0 and 1 alike, since an empty output asks
    nothing. (A larger `at_least` changes the prediction of the first bits, to that given that many are printed.)

    Raises UniversalError for settings out of range, and if millions of programs print too little.
    """
    machine = get_machine(machine)
    for name, value, least, most in (
        ("rows", rows, 1, 2**31),
        ("n_bits", n_bits, 1, 2**31),
        ("depth", depth, 1, 2**31),
        ("steps", steps, 1, MOST_STEPS),
        ("at_least", at_least, 0, n_bits),
    ):
        require(name, value, least, most)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    missing, vain = rows, 0
    while missing > 0:
        block = max(2 * missing, 256)
        bits, lengths = _run_all(machine, draw.integers(machine.size, size=(block, depth)), n_bits, steps)
        kept = np.flatnonzero(lengths >= at_least)[:missing]
        found.append((bits[kept], lengths[kept]))
        missing, vain = missing - len(kept), 0 if len(kept) else vain + block
        if vain > _PATIENCE:
            raise UniversalError(
                f"none of {vain:,} programs of {depth} instructions of {machine.name} printed {at_least} bits; "
                "ask for fewer, or allow longer programs"
            )
    bits, lengths = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return bits, lengths


def _run_all(machine: Machine, programs: np.ndarray, n_bits: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits and lengths of the outputs of programs [rows, depth], numbers of instructions."""
    if isinstance(machine, BrainPhoque) and uses_numba("to run programs"):
        from bmojo.universal import program_tree

        codes = np.array([program_tree.CODES[instruction] for instruction in machine.instructions])
        return program_tree.outputs(codes[programs], machine.cells, steps, n_bits)
    bits, lengths = np.zeros((len(programs), n_bits), np.uint8), np.zeros(len(programs), np.int64)
    for row, program in enumerate(programs):
        state, printed = machine.start(), 0
        for number in program:
            state, new, _, outcome = machine.run(
                machine.extend(state, machine.instructions[number]), steps, n_bits - printed
            )
            bits[row, printed : printed + len(new)] = new
            printed += len(new)
            if outcome != "request":
                break
        lengths[row] = printed
    return bits, lengths
