"""The tree of a BrainPhoque machine's programs in numba: what `table`, `search` and `sample` walk where speed matters.

`machine.BrainPhoque` defines the semantics. Here an instruction is a number, and those that do the same on bits ('+'
and '-') are one with weight 2; the tape is rotated so that bit 0 is under the head; an output is an integer with a
leading one before its bits.
"""

from __future__ import annotations

import numpy as np

from bmojo.universal.compiled import compiled
from bmojo.universal.machine import BrainPhoque

FLIP, RIGHT, LEFT, OPEN, CLOSE, PRINT, DEFERRED = range(7)
REQUEST, PRINTED, LOOP, TIMEOUT, FULL = range(5)
FIRST, ENDED, LOOPED, LATE = range(4)
UNSET = -1
ANY = 2  # a bit that may be 0 or 1
CODES = {"+": FLIP, "-": FLIP, ">": RIGHT, "<": LEFT, "[": OPEN, "]": CLOSE, ".": PRINT}


def distinct(machine: BrainPhoque) -> tuple[np.ndarray, np.ndarray]:
    """The instructions that differ, int64 in the order of the machine's, and how often each is there, uint64."""
    codes = [CODES[instruction] for instruction in machine.instructions]
    unique = list(dict.fromkeys(codes))
    return np.array(unique), np.array([codes.count(code) for code in unique], np.uint64)


# One machine. code, jump [instructions], stack [open brackets] are written in place; `undo` takes it back.


@compiled
def _extend(code, jump, stack, op, size, top, tape):
    """Writes an instruction at `size`; returns how many brackets are open now, and which it closed."""
    code[size], jump[size] = op, UNSET
    if op == OPEN:
        if tape & 1:
            stack[top] = size
            return top + 1, UNSET
        code[size] = DEFERRED
    elif op == CLOSE and top > 0:
        jump[size] = stack[top - 1]
        return top - 1, stack[top - 1]
    return top, UNSET


@compiled
def _run(code, jump, stack, size, at, top, tape, cells, taken, steps):
    """Runs until something happens; returns what, the new (at, top, tape, taken), and the bracket whose jump was set.

    `taken` counts the steps since the last instruction was asked for, `steps` limits it.
    """
    noted_at, noted_tape = UNSET, np.int64(0)
    while at < size:
        if at == noted_at and tape == noted_tape:
            return LOOP, at, top, tape, taken, UNSET
        if taken == steps:
            return TIMEOUT, at, top, tape, taken, UNSET
        if taken and taken & (taken - 1) == 0:
            noted_at, noted_tape = at, tape
        taken += 1
        op = code[at]
        here = at
        at += 1
        if op == FLIP:
            tape ^= 1
        elif op == RIGHT:
            tape = (tape >> 1) | ((tape & 1) << (cells - 1))
        elif op == LEFT:
            tape = ((tape << 1) & ((1 << cells) - 1)) | (tape >> (cells - 1))
        elif op == PRINT:
            return PRINTED, at, top, tape, taken, UNSET
        elif op == CLOSE:
            if jump[here] != UNSET:
                at = jump[here]
        elif (tape & 1) != (op == OPEN):
            if jump[here] != UNSET:
                at = jump[here]
            else:
                jump[here] = size
                if op == DEFERRED:
                    stack[top] = here
                    top += 1
                return REQUEST, size, top, tape, taken, here
    return REQUEST, at, top, tape, taken, UNSET


@compiled
def _undo(jump, stack, link, closed, top):
    """Takes back what extending and running did, where `top` brackets were open before."""
    if closed != UNSET:
        stack[top - 1] = closed
    if link != UNSET:
        jump[link] = UNSET


# A counter: open addressing, where the key 0 is a free slot. At most half of the slots are used.


@compiled
def _count(keys, counts, key, by):
    """Adds to a counter in place; returns whether the key is new."""
    mask = len(keys) - 1
    mixed = (key ^ (key >> 31)) * np.int64(-7046029254386353131)  # 2^64 over the golden ratio
    slot = (mixed ^ (mixed >> 32)) & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    new = keys[slot] == 0
    keys[slot] = key
    counts[slot] += by
    return new


@compiled
def _grown(keys, counts):
    """The counter with four times the slots."""
    more, more_counts = np.zeros(4 * len(keys), np.int64), np.zeros(4 * len(keys), np.uint64)
    for slot in range(len(keys)):
        if keys[slot] != 0:
            _count(more, more_counts, keys[slot], counts[slot])
    return more, more_counts


@compiled
def expand(start, cells, ops, weights, depth, steps, n_bits, prefix):
    """All that a machine with the tape `start` and no open bracket does with 1 to `depth` more instructions.

    A path ends where no bracket is open any more, where it has printed n_bits, or where it loops or times out. Only
    nodes below `prefix` count, the indices into `ops` of the first instructions.

    Returns keys, counts and uint64 [depth + 1, n_bits], the nodes with open brackets by instructions and bits printed;
    and how many nodes were visited. A key is, from the lowest bits: the output (n_bits + 1 bits), the tape (`cells`; 0
    unless ENDED), the number of instructions (5) and what happened then: FIRST, the output was reached; ENDED, no
    bracket is open any more; LOOPED; LATE. Costs about 150 ns a node.
    """
    over = n_bits + 1
    shift = cells + over
    keys, counts, used = np.zeros(1024, np.int64), np.zeros(1024, np.uint64), 0
    still_open = np.zeros((depth + 1, n_bits), np.uint64)
    nodes = 0
    code, jump, stack = np.empty(depth, np.int64), np.empty(depth, np.int64), np.empty(depth, np.int64)
    # By level: the machine as it asks for the next instruction, which one comes next, and how to undo the last
    tapes, outputs, lengths = np.empty(depth, np.int64), np.empty(depth, np.int64), np.empty(depth, np.int64)
    tops, weight, choice = np.empty(depth, np.int64), np.empty(depth, np.uint64), np.empty(depth, np.int64)
    links, closes = np.empty(depth, np.int64), np.empty(depth, np.int64)
    tapes[0], outputs[0], lengths[0], tops[0], weight[0], choice[0] = start, 1, 0, 0, np.uint64(1), 0
    level = 0
    while level >= 0:
        given = level < len(prefix)
        if choice[level] == (1 if given else len(ops)):
            if level > 0:
                _undo(jump, stack, links[level], closes[level], tops[level - 1])
            level -= 1
            continue
        if 2 * (used + over) > len(keys):  # a node adds n_bits + 1 keys at most
            keys, counts = _grown(keys, counts)
        which = prefix[level] if given else choice[level]
        choice[level] += 1
        by = weight[level] * weights[which]
        tape, output, length = tapes[level], outputs[level], lengths[level]
        top, closed = _extend(code, jump, stack, ops[which], level, tops[level], tape)
        nodes += not given
        at, taken, link, event = level, 0, UNSET, PRINTED
        while event == PRINTED:
            event, at, top, tape, taken, link = _run(code, jump, stack, level + 1, at, top, tape, cells, taken, steps)
            if event == PRINTED:
                output, length = (output << 1) | (tape & 1), length + 1
                if not given:
                    used += _count(keys, counts, ((FIRST << 5 | level + 1) << shift) | output, by)
                if length == n_bits:
                    event = FULL
        if event == REQUEST and top > 0:
            if not given:
                still_open[level + 1, length] += by
            if level + 1 < depth:
                level += 1
                tapes[level], outputs[level], lengths[level] = tape, output, length
                tops[level], weight[level], choice[level] = top, by, 0
                links[level], closes[level] = link, closed
                continue
        elif not given and event != FULL:
            what = ENDED if event == REQUEST else LOOPED if event == LOOP else LATE
            seen = tape << over if event == REQUEST else 0
            used += _count(keys, counts, ((what << 5 | level + 1) << shift) | seen | output, by)
        _undo(jump, stack, link, closed, tops[level])
    kept = keys != 0
    return keys[kept], counts[kept], still_open, nodes


@compiled
def spread(outputs, counts, words, word_counts, n_bits, table):
    """Adds counts[i] * word_counts[j] to the table, at outputs[i] followed by words[j] if that has at most n_bits."""
    for j in range(len(words)):
        length = 0
        while words[j] >> (length + 1):
            length += 1
        bits = words[j] - (1 << length)
        for i in range(len(outputs)):
            output = (outputs[i] << length) | bits
            if output >> (n_bits + 1) == 0:
                table[output] += counts[i] * word_counts[j]


@compiled
def follow(outputs, counts, keys, key_counts, n_bits):
    """A counter of tape and output, tape << (n_bits + 1) | output: counts[i] * key_counts[j] for outputs[i] followed by
    the output of keys[j], if that has fewer than n_bits, on the tape of keys[j]."""
    over = n_bits + 1
    joined, joined_counts, used = np.zeros(1024, np.int64), np.zeros(1024, np.uint64), 0
    for j in range(len(keys)):
        tape, word = keys[j] >> over, keys[j] & ((1 << over) - 1)
        length = 0
        while word >> (length + 1):
            length += 1
        bits = word - (1 << length)
        for i in range(len(outputs)):
            output = (outputs[i] << length) | bits
            if output >> n_bits == 0:
                if 2 * (used + 1) > len(joined):
                    joined, joined_counts = _grown(joined, joined_counts)
                used += _count(joined, joined_counts, (tape << over) | output, counts[i] * key_counts[j])
    kept = joined != 0
    return joined[kept], joined_counts[kept]


@compiled
def dovetail(cells, ops, weights, costs, gains, steps, data, table):
    """Every program whose first l instructions bring it to a new bit within steps[l] steps, l = 1 .. len(steps) - 1.

    data [n] is what they must print, with ANY where either bit will do. table [2^(n+1)] or [1]: where a program first
    prints an output after t steps, gains[i] * weight is added, i the least with 2^i >= costs[l] * t; none with [1].

    Returns the program that prints all of the data at the least costs[l] * t, the shortest of these, the first of
    those in the order of `ops`: its instructions and steps (no instructions if there is none); nodes and steps.
    """
    most, n_bits = len(steps) - 1, len(data)
    best, best_cost, best_steps = np.zeros(0, np.int64), np.int64(0), 0
    nodes, spent = 0, 0
    code, jump, stack = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    path = np.empty(most, np.int64)
    tapes, outputs, lengths = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    tops, weight, choice = np.empty(most, np.int64), np.empty(most, np.float64), np.empty(most, np.int64)
    times, links, closes = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    tapes[0], outputs[0], lengths[0], tops[0], weight[0], choice[0], times[0] = 0, 1, 0, 0, 1.0, 0, 0
    level = 0
    while level >= 0:
        if choice[level] == len(ops):
            if level > 0:
                _undo(jump, stack, links[level], closes[level], tops[level - 1])
            level -= 1
            continue
        which = choice[level]
        choice[level] += 1
        by = weight[level] * weights[which]
        tape, output, length, before = tapes[level], outputs[level], lengths[level], times[level]
        path[level] = which
        top, closed = _extend(code, jump, stack, ops[which], level, tops[level], tape)
        nodes += 1
        at, taken, link, event = level, 0, UNSET, PRINTED
        while event == PRINTED:
            event, at, top, tape, taken, link = _run(
                code, jump, stack, level + 1, at, top, tape, cells, taken, steps[level + 1] - before
            )
            if event == PRINTED:
                bit = tape & 1
                if data[length] != ANY and data[length] != bit:
                    event = FULL
                    break
                length += 1
                if len(table) > 1:
                    output = (output << 1) | bit
                    phase = 0
                    while (np.int64(1) << phase) < costs[level + 1] * (before + taken):
                        phase += 1
                    table[output] += gains[phase] * by / costs[level + 1]
                if length == n_bits:
                    event = FULL
                    cost = costs[level + 1] * (before + taken)
                    if best_cost == 0 or cost < best_cost or (cost == best_cost and level + 1 < len(best)):
                        best, best_cost, best_steps = path[: level + 1].copy(), cost, before + taken
        spent += taken
        if event == REQUEST and level + 1 < most and before + taken < steps[level + 2]:
            level += 1
            tapes[level], outputs[level], lengths[level], times[level] = tape, output, length, before + taken
            tops[level], weight[level], choice[level] = top, by, 0
            links[level], closes[level] = link, closed
            continue
        _undo(jump, stack, link, closed, tops[level])
    return best, best_steps, nodes, spent


@compiled
def outputs(programs, cells, steps, n_bits):
    """What programs [rows, D] of instructions print: bits uint8 [rows, n_bits], 0 behind the end; how many, [rows]."""
    rows, depth = programs.shape
    bits, lengths = np.zeros((rows, n_bits), np.uint8), np.zeros(rows, np.int64)
    code, jump, stack = np.empty(depth, np.int64), np.empty(depth, np.int64), np.empty(depth, np.int64)
    for row in range(rows):
        tape, top, size, event = np.int64(0), 0, 0, REQUEST
        while event == REQUEST and size < depth:
            top, _ = _extend(code, jump, stack, programs[row, size], size, top, tape)
            at, taken, event = size, 0, PRINTED
            size += 1
            while event == PRINTED:
                event, at, top, tape, taken, _ = _run(code, jump, stack, size, at, top, tape, cells, taken, steps)
                if event == PRINTED:
                    bits[row, lengths[row]] = tape & 1
                    lengths[row] += 1
                    if lengths[row] == n_bits:
                        event = FULL
    return bits, lengths
