"""The bars, the losses, the tables and the figures of made-up results."""

import struct

import pytest
from bench_made import made_cell, made_entry, made_results

from bmojo.bench.bars import BARS, Bar, judge
from bmojo.bench.report import summary, write_report
from bmojo.schema import check_schema


def bar(what):
    return next(bar for bar in BARS if bar.what == what)


def test_the_made_up_results_follow_the_schema(results):
    check_schema(results, "bmojo.bench")


def test_bars_are_held_broken_or_not_measured(results):
    mamba2 = judge(bar("`mamba2` over Transformers' Mamba-2"), [results])
    assert mamba2.measured == pytest.approx(0.8)
    assert mamba2.where == "transformers at time 2,048"
    assert mamba2.missing == (1024, 4096)
    assert mamba2.held is False
    fast = judge(bar("`bmojo` over `transformer`, training"), [results])
    assert (fast.measured, fast.held, fast.missing) == (2, None, (4096, 8192))
    assert fast.word == "held (not measured at 4,096, 8,192)"
    stream = judge(bar("growth in bytes over a stream"), [results])
    assert (stream.measured, stream.held, stream.word) == (4e6, True, "held")
    s6 = judge(bar("`s6` over mambapy and `associative_scan`, N=16"), [results])
    assert (s6.measured, s6.held, s6.word) == (None, None, "not measured")


def test_a_bar_looks_at_its_own_device_size_and_presets():
    own = Bar("", "train", "growth", ("far",), "time", (2048,), 4.6, at_least=False, settings={"size": "370m"},
              device="H100")  # fmt: skip
    cells = [
        made_cell("train", "growth", 2048, [made_entry("far", 4, 1)], size="370m"),
        made_cell("train", "growth", 2048, [made_entry("far", 7, 1)]),
        made_cell("train", "growth", 2048, [made_entry("far", 8, 1)], size="370m", changes={"window": 64}),
        made_cell("train", "growth", 1024, [made_entry("far", 9, 1)], size="370m"),
    ]
    assert judge(own, [made_results(cells)]).measured is None
    both = [made_results(cells[1:]), made_results(cells, "NVIDIA H100 80GB HBM3")]
    assert judge(own, both).measured == 4
    assert judge(own, both).held


def test_losses_are_a_list_of_their_own_the_worst_first(results):
    lines = summary([results]).partition("Where ours loses:")[2].strip().splitlines()
    assert lines == [
        "- train: family, forward + backward, tiny: mamba2 takes 0.500 [0.450, 0.550] at time 512, "
        "0.500 [0.450, 0.550] at time 2,048 of our time",
        "- train: mamba2, forward + backward, tiny: transformers takes 0.800 [0.720, 0.880] at time 2,048 of our time",
    ]


def test_the_report_tells_all_and_draws_it(results, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").write_bytes(b"")
    write_report(tmp_path, [results])
    text = (tmp_path / "report.md").read_text()
    for part in (
        "Example, 2 threads of 2 cores; PyTorch 2.13.0",
        "transformers 5.23.0, mambapy not installed",
        "100 GFLOP/s in a matrix product, 10.0 GB/s in a copy",
        "- mambapy: not installed: mambapy",
        "| `2,048: transformers` | 800 [720, 880] | 0.800 [0.720, 0.880] | 1,280 | 25 % | 1.00 MiB | 1,234 |",
        "3.81 MiB",
    ):
        assert part in text
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"speed", "ratios", "decode", "floor", "memory", "stream"}
    for path in (tmp_path / "figures").iterdir():
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert min(width, height) > 500
        assert f"(figures/{path.name})" in text


def test_two_machines_are_told_apart(results, tmp_path):
    write_report(tmp_path, [results, {**results, "machine": {**results["machine"], "device": "NVIDIA H100"}}])
    text = (tmp_path / "report.md").read_text()
    assert "- Machine: NVIDIA H100" in text
    assert "## train: mamba2, forward + backward, tiny (cpu)" in text
    assert "figures/speed_2.png" in text
