"""How contestants are timed, with a clock that is told what to say."""

import gc

import pytest
import torch

from bmojo.bench.contest import Contestant, Missing, Runner, race, spread, stopwatch
from bmojo.bench.floor import Rates, Work

RATES = Rates(flops=1e9, bytes=1e6)


class Clock:
    """Says that each contestant takes its own time, and notes who ran."""

    def __init__(self, **seconds):
        self.seconds, self.ran, self.collecting = seconds, [], []

    def contestant(self, name, **kind):
        def make():
            return Runner(lambda: self.ran.append(name), parameters=10)

        return Contestant(name, make, tokens=100, work=Work(10**9, 10**6), **kind)

    def __call__(self, run):
        run()
        self.collecting.append(gc.isenabled())
        given = self.seconds[self.ran[-1]]
        return given[min(self.ran.count(self.ran[-1]), len(given)) - 1]


def test_each_round_is_begun_by_another_and_ratios_are_within_it():
    """In the second round the machine is three times as slow, for both."""
    clock = Clock(ours=[9, 9, 1, 3, 1], theirs=[9, 9, 2, 6, 4])
    found = race([clock.contestant("ours"), clock.contestant("theirs", rival=True)], 3, clock, RATES)
    assert clock.ran[4:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert not any(clock.collecting[-6:])
    assert gc.isenabled()
    ours, theirs = found["entries"]
    assert ours["seconds"] == spread([1, 3, 1])
    assert ours["ratio"] == spread([1, 1, 1])
    assert theirs["ratio"] == spread([2, 2, 4])
    assert theirs["rival"]
    assert theirs["tokens_per_second"] == 100 / 4
    assert ours["parameters"] == 10
    assert ours["floor_share"] == 2  # a second for the FLOPs, a second for the bytes
    assert found["rounds"] == 3
    assert found["absent"] == {}


def test_the_first_run_compiles_and_none_of_it_is_in_the_times():
    clock = Clock(ours=[1], compiled=[50, 50, 2])
    found = race([clock.contestant("ours"), clock.contestant("compiled", compiled=True)], 2, clock, RATES)
    assert found["entries"][1]["compile_seconds"] == 50
    assert found["entries"][1]["seconds"]["high_quartile"] == 2
    assert "compile_seconds" not in found["entries"][0]


def fail(error):
    def make():
        raise error

    return make


def test_who_can_not_run_is_named():
    clock = Clock(ours=[1])
    absent = [
        Contestant("missing", fail(Missing("not installed: mambapy")), 1, rival=True),
        Contestant("large", fail(torch.OutOfMemoryError("tried to allocate")), 1),
        Contestant("broken", fail(TypeError("no such argument\nmore")), 1, rival=True),
    ]
    found = race([clock.contestant("ours"), *absent], 1, clock, RATES)
    assert [entry["name"] for entry in found["entries"]] == ["ours"]
    assert found["absent"] == {
        "missing": "not installed: mambapy",
        "large": "out of memory",
        "broken": "failed: TypeError: no such argument",
    }


def test_an_error_of_ours_is_no_result():
    with pytest.raises(TypeError):
        race([Contestant("ours", fail(TypeError("a bug")), 1)], 1, Clock(), RATES)


def test_without_ours_there_are_no_ratios():
    clock = Clock(theirs=[1])
    contestants = [Contestant("ours", fail(Missing("no device")), 1), clock.contestant("theirs")]
    found = race(contestants, 1, clock, RATES)
    assert "ratio" not in found["entries"][0]


def test_what_a_run_holds_is_counted_and_not_what_was_there():
    held = torch.ones(2**22)

    def run():
        torch.ones(2**24).sum()

    contestant = Contestant("ours", lambda: Runner(run, prepare=lambda: held.add_(1)), 1)
    (entry,) = race([contestant], 1, stopwatch("cpu"), RATES)["entries"]
    assert entry["peak_memory_bytes"] == pytest.approx(4 * 2**24, rel=0.2)
    assert float(held[0]) == 4  # it is prepared before each of the three runs
    assert entry["seconds"]["median"] > 0
