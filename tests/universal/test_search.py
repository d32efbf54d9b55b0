"""Levin's search and the speed prior: compiled = from one frontier = by definition."""

import math

import numpy as np
import pytest

from bmojo.errors import UniversalError
from bmojo.universal import SolomonoffTable, levin_search, speed_prior
from bmojo.universal import compiled as compiled_or_not
from bmojo.universal.machine import MACHINES

BOTH = pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))


def printed(machine, n_bits, depth, steps):
    """(program, output, steps in all) of every program of up to `depth` instructions, as each bit comes."""

    def visit(program, state, output, taken):
        for instruction in machine.instructions if len(program) < depth else ():
            text, now, seen, spent = program + instruction, machine.extend(state, instruction), output, taken
            while spent < steps and len(seen) < n_bits:
                now, bits, more, outcome = machine.run(now, steps - spent, 1)
                spent += more
                if outcome == "request":
                    yield from visit(text, now, seen, spent)
                if outcome != "full":
                    break
                seen += str(bits[0])
                yield text, seen, spent

    yield from visit("", machine.start(), "", 0)


@BOTH
def test_the_first_hit_has_the_least_kt(machine):
    best = {}
    for program, output, steps in printed(machine, 7, 5, 60):
        kt = len(program) * math.log2(machine.size) + math.log2(steps)
        best[output] = min(best.get(output, (math.inf, "", 0)), (kt, program, steps))
    for data in ("0", "1", "01", "0000", "1111", "1111111"):
        found = levin_search(data, machine)
        kt, program, steps = best[data]
        assert found.kt == pytest.approx(kt)
        assert (found.program, found.steps) == (program, steps)
        assert found.phase - 1 < found.kt <= found.phase
        assert found.bits == pytest.approx(found.length * math.log2(machine.size))


@BOTH
@pytest.mark.parametrize("data", ["0", "10", "000", "11111", "0101"])
def test_compiled_search_is_that_from_one_frontier(machine, data, monkeypatch):
    compiled = levin_search(data, machine, 16)
    monkeypatch.setattr(compiled_or_not, "HAS_NUMBA", False)
    with pytest.warns(UserWarning, match="a search is 100 times slower without numba"):
        plain = levin_search(data, machine, 16)
    assert (plain.program, plain.steps, plain.phase) == (compiled.program, compiled.steps, compiled.phase)


def test_what_is_not_found_is_said():
    so_far = []
    found = levin_search("0110100110010110", max_phase=14, progress=so_far.append)
    assert (found.program, found.kt, found.phase) == (None, math.inf, 14)
    assert [one.phase for one in so_far] == list(range(1, 15))
    assert so_far[-1] == found


def test_a_period_is_found():
    found = levin_search("0101010101")
    assert found.program == "+[+.+.]"
    machine, state, output = MACHINES["bp7"], MACHINES["bp7"].start(), ""
    for instruction in found.program:
        state, bits, *_ = machine.run(machine.extend(state, instruction), 1024, 10 - len(output))
        output += "".join(map(str, bits))
    assert output == found.data


@BOTH
def test_the_speed_prior_is_its_definition(machine, monkeypatch):
    phases, n_bits = 13, 3
    expected = [np.zeros(1 << t) for t in range(n_bits + 1)]
    expected[0][0] = sum(2.0**-i for i in range(1, phases + 1))
    for program, output, steps in printed(machine, n_bits, 4, 2**phases):
        for i in range(1, phases + 1):
            if steps * machine.size ** len(program) <= 2**i:
                expected[len(output)][int(output, 2)] += 2.0**-i * machine.size ** -len(program)
    compiled = speed_prior(n_bits, phases, machine)
    monkeypatch.setattr(compiled_or_not, "HAS_NUMBA", False)
    with pytest.warns(UserWarning, match="the speed prior is 100 times slower without numba"):
        plain = speed_prior(n_bits, phases, machine)
    for one in (compiled, plain):
        for level, by_definition in zip(one.levels, expected, strict=True):
            np.testing.assert_allclose(level, by_definition, rtol=1e-12)


def test_the_speed_prior_is_bounded_and_below_the_mixture():
    short, long = speed_prior(6, 12), speed_prior(6, 18)
    mixture = SolomonoffTable.build(n_bits=6, depth=8, steps=2**18)
    for x in ("0", "11", "0101", "111111"):
        (low, high), (lower, upper) = short.bounds(x), long.bounds(x)
        assert low <= lower <= upper <= high
        assert lower <= mixture.count(x) / mixture.total


def test_bad_input_is_refused():
    with pytest.raises(UniversalError, match="must be of bits, 0 and 1, got '01a'"):
        levin_search("01a")
    with pytest.raises(UniversalError, match="at least one bit"):
        levin_search("")
    with pytest.raises(UniversalError, match="max_phase must be from 1 to 62, got 63"):
        levin_search("0", max_phase=63)
    with pytest.raises(UniversalError, match="n_bits must be from 1 to 20, got 0"):
        speed_prior(0, 5)
    with pytest.raises(UniversalError, match="up to 2 bits, got 3"):
        speed_prior(2, 5).bounds("000")
