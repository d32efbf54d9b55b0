"""The machines against plain Brainfuck, and what their certificates and merges promise."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bmojo.errors import UniversalError
from bmojo.universal.machine import MACHINES, UNSET, get_machine

BP7, BP6 = MACHINES["bp7"], MACHINES["bp6"]
PROGRAMS = st.text("+-><[].", min_size=1, max_size=24)


def execute(machine, program, steps=256, room=16):
    """All that is printed, how it ends, and the last state."""
    state, printed, outcome = machine.start(), "", "request"
    for instruction in program:
        state, bits, _, outcome = machine.run(machine.extend(state, instruction), steps, room - len(printed))
        printed += "".join(map(str, bits))
        if outcome != "request":
            break
    return printed, outcome, state


@pytest.mark.parametrize(
    ("program", "printed", "outcome"),
    [
        (".", "0", "request"),
        ("+.-.", "10", "request"),
        ("+[.]", "1" * 16, "full"),
        ("+[+.+.]", "01" * 8, "full"),
        ("].", "0", "request"),  # no bracket is open
        ("[+.", "1", "request"),  # the bracket is skipped, its body never drawn
        ("+[]", "", "loop"),
        ("+[.-].", "10", "request"),  # behind the loop
        ("+[>+]", "", "request"),  # around the ring, till it meets the first 1 and makes it 0
    ],
)
def test_known_programs(program, printed, outcome):
    assert execute(BP7, program)[:2] == (printed, outcome)


def plain(state):
    """The same program in Brainfuck, each body where it belongs; '!' where nothing has been drawn yet."""
    code, jumps = state.code, state.jumps

    def part(at, close):
        text = ""
        while at < len(code):
            if code[at] == "]":
                if jumps[at] != UNSET:
                    return text + close
                at += 1
            elif code[at] in "[{":
                body, behind = (at + 1, jumps[at]) if code[at] == "[" else (jumps[at], at + 1)
                text += "[" + ("!]" if body == UNSET else part(body, "]"))
                if behind == UNSET:
                    break
                at = behind
            else:
                text += code[at]
                at += 1
        return text + "!" + close

    return part(0, "")


def brainfuck(program, cells, steps, room):
    """What a program prints, by the textbook: brackets are matched first, and the head moves over an array."""
    match, stack = {}, []
    for at, instruction in enumerate(program):
        if instruction == "[":
            stack.append(at)
        elif instruction == "]":
            match[at] = stack.pop()
            match[match[at]] = at
    tape, head, at, printed = [0] * cells, 0, 0, ""
    for _ in range(steps):
        instruction = program[at] if at < len(program) else "!"
        if instruction == "!" or len(printed) == room:
            break
        if instruction in "+-":
            tape[head] = 1 - tape[head]
        elif instruction in "><":
            head = (head + (1 if instruction == ">" else -1)) % cells
        elif instruction == ".":
            printed += str(tape[head])
        elif (instruction == "[") == (tape[head] == 0):
            at = match[at]
        at += 1
    return printed


@given(PROGRAMS, st.sampled_from([2, 3, 32]))
@example("[+[>.]<+]", 2)
@example("+[[>[.<]+]-]>+.", 3)
@example("+[>[.<+]+]+.", 2)
def test_prints_what_brainfuck_prints(program, cells):
    machine = type(BP7)("small", "+-><[].", cells)
    printed, outcome, state = execute(machine, program, steps=200)
    expected = brainfuck(plain(state), cells, 100_000 if outcome == "request" else 2_000, 16)
    if outcome == "timeout":
        assert expected.startswith(printed)
    else:
        assert printed == expected


def test_a_certified_loop_never_prints():
    looping = []
    for program in itertools.product("+>[].", repeat=6):
        printed, outcome, state = execute(BP6, program)
        if outcome == "loop" and len(state.code) == 6:
            looping.append((printed, state))
    assert len(looping) > 30
    for printed, state in looping[:: len(looping) // 16]:
        assert brainfuck(plain(state), BP6.cells, 100_000, 16) == printed


@given(PROGRAMS, PROGRAMS)
def test_merged_states_have_the_same_future(program, more):
    _, outcome, state = execute(BP7, program)
    if outcome != "request":
        return
    merged = BP7.merged(state)
    for instruction in more:
        one = BP7.run(BP7.extend(state, instruction), 64, 8)
        other = BP7.run(BP7.extend(merged, instruction), 64, 8)
        assert one[1:] == other[1:]
        if one.outcome != "request":
            break
        state, merged = one.state, other.state


@given(PROGRAMS, st.integers(1, 9))
def test_a_run_in_parts_is_the_run(program, part):
    state = BP7.start()
    for instruction in program:
        state = BP7.extend(state, instruction)
        whole = BP7.run(state, 400, 99)
        bits, steps = (), 0
        while True:
            run = BP7.run(state, part, 99)
            state, bits, steps = run.state, bits + run.bits, steps + run.steps
            if run.outcome != "timeout" or steps > 400:
                break
        if whole.outcome != "request":
            return
        assert (state, bits, steps) == (whole.state, whole.bits, whole.steps)


@pytest.mark.parametrize("settings", [("+.,",), (".",), ("+.", 0), ("+.", 63)])
def test_impossible_machines_are_refused(settings):
    with pytest.raises(UniversalError, match=r"two or more of|cells must be from 1 to 62"):
        type(BP7)("mine", *settings)


def test_an_unknown_machine_is_refused():
    with pytest.raises(UniversalError, match="did you mean 'bp7'"):
        get_machine("bp8")
    assert get_machine(BP6) is BP6
