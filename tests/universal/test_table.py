"""The table against brute force over programs, its bounds and its mass, and what survives kill -9."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo.errors import BMojoError, UniversalError
from bmojo.universal import CTW, KT, SolomonoffTable, enumeration, table
from bmojo.universal.enumeration import Counts, count, count_plainly
from bmojo.universal.machine import MACHINES, BrainPhoque, Machine, Run
from bmojo.universal.plot import table_picture

BUILDS = st.builds(
    SolomonoffTable.build,
    machine=st.sampled_from(["bp7", "bp6"]),
    n_bits=st.integers(1, 9),
    depth=st.integers(1, 8),
    steps=st.sampled_from([1, 2, 3, 7, 20, 1024]),
)


def same(one, other):
    for name in ("first", "loops", "timeouts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.depth == other.depth


def brute_force(machine, n_bits, depth, steps):
    """Every program by itself, from the first instruction on."""
    counts = Counts.none(n_bits)
    counts.first[1] = machine.size**depth

    def visit(state, output, left):
        if left == 0:
            counts.depth += 1
            return
        for instruction in machine.instructions:
            run = machine.run(machine.extend(state, instruction), steps, n_bits + 1 - output.bit_length())
            reached, unit = output, machine.size ** (left - 1)
            for bit in run.bits:
                reached = 2 * reached + bit
                counts.first[reached] += np.uint64(unit)
            if run.outcome == "request":
                visit(run.state, reached, left - 1)
            elif run.outcome != "full":
                {"loop": counts.loops, "timeout": counts.timeouts}[run.outcome][reached] += np.uint64(unit)

    visit(machine.start(), 1, depth)
    return counts


SMALL = [BrainPhoque("narrow", "+><[].", 1), BrainPhoque("wide", "+-<[].", 40), BrainPhoque("full", ".]")]


@pytest.mark.parametrize("machine", SMALL, ids=[machine.name for machine in SMALL])
def test_every_entry_of_other_machines(machine):
    same(count(machine, 4, 6, 20), brute_force(machine, 4, 6, 20))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize(
    ("n_bits", "depth", "steps"),
    [(1, 1, 1), (3, 4, 1024), (16, 5, 1024), (2, 5, 5), (5, 5, 1), (12, 5, 13), (16, 7, 4), (16, 7, 1024)],
)
def test_every_entry_is_that_of_brute_force(machine, n_bits, depth, steps):
    truth = brute_force(machine, n_bits, depth, steps)
    same(count_plainly(machine, n_bits, depth, steps), truth)
    same(count(machine, n_bits, depth, steps), truth)


@settings(max_examples=30, deadline=None)
@given(BUILDS)
def test_mass_is_conserved_and_m_is_a_semimeasure(built):
    assert sum(built.mass().values()) == built.total
    assert built._cut.min() >= 0
    assert built._cut.sum() == built.counts.depth  # which was counted apart
    for shorter, longer in zip(built.levels(), built.levels()[1:], strict=False):
        assert (longer.reshape(-1, 2).sum(1) <= shorter).all()
    for x in ("", "0", "1", "01", "110")[: built.n_bits + 1]:
        assert sum(built.mass(x).values()) == built.total


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["bp7", "bp6"]), st.integers(1, 7), st.sampled_from([(1, 3), (3, 8), (8, 1024)]))
def test_more_programs_and_more_time_only_add(machine, depth, steps):
    less, longer, slower = (
        SolomonoffTable.build(machine, 7, d, t)
        for d, t in ((depth, steps[0]), (depth + 1, steps[0]), (depth, steps[1]))
    )
    size = np.uint64(less.size)
    assert (longer.counts.first >= less.counts.first * size).all()
    assert (slower.counts.first >= less.counts.first).all()


def test_longer_strings_leave_shorter_ones_as_they_are():
    long, short = (SolomonoffTable.build("bp7", n_bits, 8, 50) for n_bits in (17, 5))
    assert (long.counts.first[: 2 << 5] == short.counts.first).all()


def test_bounds_nest_as_programs_grow_longer():
    tables = [SolomonoffTable.build("bp7", 8, depth) for depth in range(1, 10)]
    for x in ("", "0", "1", "010", "1111111", "0110100"):
        nested = []
        for built in tables:
            low, high = built.bounds(x)
            assert low == built.count(x)
            one = built.conditional(x)
            nested.append((low / built.total, high / built.total, one.lower, one.upper))
            assert not one.supported or one.lower <= one.one <= one.upper
        low, high, lower, upper = np.array(nested).T
        assert (np.diff(low) >= 0).all()
        assert (np.diff(high) <= 0).all()
        assert (np.diff(lower) >= 0).all()
        assert (np.diff(upper) <= 0).all()


def test_predictions_entropy_and_measure_are_of_one_measure():
    built = SolomonoffTable.build("bp7", 6, 9)
    assert built.measure.sum() == pytest.approx(1, abs=1e-12)
    strings = [f"{x:06b}" for x in range(64)]
    for x in strings[::7]:
        by_steps = sum(np.log2(abs(1 - int(x[t]) - built.conditional(x[:t]).one)) for t in range(6))
        assert built.log2_probability(x) == pytest.approx(by_steps, abs=1e-9)
    assert 2 ** built.log2_probability("01") == pytest.approx(built.measure[16:32].sum())
    assert built.entropy() == pytest.approx(-sum(p * np.log2(p) for p in built.measure if p), abs=1e-9)
    assert built.divergence(built, uniform=0) == 0
    assert built.divergence(SolomonoffTable.build("bp6", 6, 9)) > 0
    assert built.top(2, 4) == [(x, built.count(x) / built.total) for x in ("0000", "1111")]
    assert built.count(np.array([0, 1], np.uint8)) == built.count([0, 1]) == built.count("01") == built.levels()[2][1]


class Coin(Machine):
    """Prints its instructions."""

    name, instructions = "coin", "01"

    def start(self):
        return ""

    def extend(self, state, instruction):
        return instruction

    def run(self, state, steps, room):
        return Run("", (int(state),), 1, "full" if room == 1 else "request")


def test_any_machine_will_do():
    built = SolomonoffTable.build(Coin(), n_bits=5, depth=7)
    for t, level in enumerate(built.levels()):
        assert (level == 2 ** (7 - t)).all()
    assert built.entropy() == 5
    assert built.mass() == {"hit": 128, "mismatch": 0, "loop": 0, "timeout": 0, "depth": 0}
    assert built.mass("011") == {"hit": 16, "mismatch": 112, "loop": 0, "timeout": 0, "depth": 0}
    assert SolomonoffTable.build(Coin(), n_bits=5, depth=3).mass()["depth"] == 8


def gap(built, predictor):
    """KL(M_norm || predictor) over whole strings."""
    n = built.n_bits
    seen = np.flatnonzero(built.measure)
    x = (seen[:, None] >> np.arange(n - 1, -1, -1) & 1).astype(np.uint8)
    one = predictor.probabilities(x)
    log2_q = np.log2(np.where(x == 1, one, 1 - one)).sum(1)
    return float(built.measure[seen] @ (np.log2(built.measure[seen]) - log2_q))


@pytest.mark.slow
def test_the_figures_of_depth_13():
    built, shorter = (SolomonoffTable.build("bp7", 16, depth) for depth in (13, 12))
    assert [shorter.coverage()[t] for t in (8, 10, 12)] == [250, 635, 936]
    assert built.coverage()[16] == 3233
    assert built.entropy() == pytest.approx(5.22, abs=0.005)
    assert 16 - built.entropy() == pytest.approx(10.78, abs=0.005)
    assert gap(built, KT()) == pytest.approx(4.61, abs=0.005)
    assert gap(built, CTW(4)) == pytest.approx(2.77, abs=0.005)
    assert gap(built, CTW(8)) == pytest.approx(2.80, abs=0.005)
    assert built.divergence(shorter) == pytest.approx(0.021, abs=0.0005)
    best = dict(built.top(10))
    assert best["1" * 16] == pytest.approx(1.3e-2, abs=5e-4)
    assert best["0" * 16] == pytest.approx(4.5e-3, abs=5e-5)
    assert best["0" + "1" * 15] == pytest.approx(4.4e-3, abs=5e-5)
    assert best["01" * 8] == pytest.approx(6.4e-4, abs=5e-6)


KILLED = """
import os, signal, sys
from bmojo.universal import SolomonoffTable, enumeration
enumeration.SAVE_EVERY = 0
left = int(sys.argv[2])
def progress(layers, nodes):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
SolomonoffTable.build("bp7", 9, 10, 50, checkpoint=sys.argv[1], progress=progress)
"""


def test_a_killed_build_goes_on_to_the_identical_table(tmp_path):
    path, whole = tmp_path / "build.part", SolomonoffTable.build("bp7", 9, 10, 50)
    done = subprocess.run([sys.executable, "-c", KILLED, path, "40"], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with np.load(path) as arrays:
        layer, tasks, *_ = arrays["progress"]
    assert layer == 1
    assert tasks > 0  # of this layer, which is not done
    steps = []
    again = SolomonoffTable.build(
        "bp7", 9, 10, 50, checkpoint=path, threads=1, progress=lambda layers, nodes: steps.append(layers)
    )
    assert steps[0] == 1
    same(again.counts, whole.counts)
    whole.save(tmp_path / "whole.npz")
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    with pytest.raises(UniversalError, match=r"checkpoint of other settings: depth 10 there, 9 asked for"):
        SolomonoffTable.build("bp7", 9, 9, 50, checkpoint=path)


def test_a_saved_table_is_the_table_and_another_is_refused(tmp_path):
    path, built = tmp_path / "table.npz", SolomonoffTable.build("bp6", 6, 6)
    built.save(path)
    again = SolomonoffTable.load(path, machine="bp6", depth=6, steps=1024)
    same(again.counts, built.counts)
    assert (again.machine, again.n_bits, again.total) == ("bp6", 6, 6**6)
    other = (
        r"other settings: depth 6 there, 13 asked for; identity 'bp6 \+><\[]\. on 32 cells' there, 'bp7 .* asked for"
    )
    with pytest.raises(UniversalError, match=other):
        SolomonoffTable.load(path, machine="bp7", depth=13)
    with pytest.raises(UniversalError, match=r"'bp6 .* on 10 cells' asked for"):
        SolomonoffTable.load(path, machine=BrainPhoque("bp6", "+><[].", 10))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UniversalError, match="no table of bmojo, or is damaged"):
        SolomonoffTable.load(path)
    np.savez(path, settings="{}")
    with pytest.raises(UniversalError, match="format None there, 1 asked for"):
        SolomonoffTable.load(path)
    built.counts.first[70] += 1
    built.save(path)
    with pytest.raises(UniversalError, match="damaged table"):
        SolomonoffTable.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": "[1]"},
        {"settings": '{"format": 1, "depth": 4}'},
        {"settings": "{"},
        {"settings": np.array({"format": 1}, object)},
        {"first": np.zeros(3, np.uint64)},
        {"loops": np.zeros(1 << 4)},
        {"depth": "many"},
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change):
    path = tmp_path / "table.npz"
    SolomonoffTable.build(n_bits=4, depth=4).save(path)
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, **change})
    with pytest.raises(UniversalError, match="no table of bmojo, or is damaged"):
        SolomonoffTable.load(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"depth": 23}, r"depth \(of 7 instructions, as counts are .* below 2\^63\) must be from 1 to 22, got 23"),
        ({"machine": "bp6", "depth": 25}, "of 6 instructions.* from 1 to 24"),
        ({"depth": 0}, "depth .* must be from 1 to 22, got 0"),
        ({"steps": 0}, "steps must be from 1 to 4,.*, got 0"),
        ({"steps": 2**63}, "steps must be from 1 to"),
        ({"threads": 0}, "threads must be from 1 to .*, got 0"),
        ({"machine": BrainPhoque("wide", "+>.", 48), "n_bits": 8}, "at most 55, and a depth of at most 31, got 48"),
        ({"machine": BrainPhoque("two", "+."), "n_bits": 8, "depth": 32}, "at most 31, got 32 . 8 and 32"),
        ({"n_bits": 21}, "n_bits must be from 1 to 20, got 21"),
        ({"machine": "bp9"}, "unknown machine 'bp9'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(UniversalError, match=says):
        SolomonoffTable.build(**settings)


def test_strings_out_of_range_are_refused():
    built = SolomonoffTable.build(n_bits=3, depth=2)
    with pytest.raises(UniversalError, match="bits, 0 and 1, got '012'"):
        built.count("012")
    with pytest.raises(UniversalError, match="up to 3 bits here, got 4"):
        built.count("0000")
    with pytest.raises(UniversalError, match="up to 2 bits here, got 3"):
        built.conditional("000")
    for x in ([10, 1], 101, None, [True], np.zeros((2, 2), int)):
        with pytest.raises(UniversalError, match="must be of bits, 0 and 1"):
            built.count(x)
    for length in (-1, 4):
        with pytest.raises(UniversalError, match=f"length must be from 0 to 3, got {length}"):
            built.top(1, length)
    assert built.top(1, 0) == [("", 1.0)]
    unknown = built.conditional("11")
    assert (unknown.one, unknown.supported) == (0.5, False)
    with pytest.raises(UniversalError, match="3 bits can't be set against one of 4"):
        built.divergence(SolomonoffTable.build(n_bits=4, depth=2))


def test_without_numba_plain_python_answers_for_small_depths(monkeypatch):
    fast = SolomonoffTable.build(n_bits=4, depth=4)
    monkeypatch.setattr(table, "HAS_NUMBA", False)
    monkeypatch.setattr(enumeration, "count", None)
    same(SolomonoffTable.build(n_bits=4, depth=4).counts, fast.counts)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BMojoError, match=r"a table of depth above 6 needs the package numba.*bmojo\[universal\]"):
        SolomonoffTable.build(n_bits=4, depth=7)


def test_the_picture_of_several_tables_has_its_name():
    tables = [SolomonoffTable.build("bp6", 4, depth) for depth in (2, 3)]
    assert table_picture(tables).name == "table"
