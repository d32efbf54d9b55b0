"""Cells of every suite on small models; what is kept when a run stops, and what is refused when it goes on."""

import json

import pytest

from bmojo.bench import cases, job
from bmojo.bench.cases import SUITES, Plan
from bmojo.bench.floor import Rates
from bmojo.bench.stream import measure as stream
from bmojo.errors import CheckpointError, ConfigError
from bmojo.schema import check_schema


@pytest.fixture
def plan(small):
    return Plan(("train", "decode"), lengths=(16,), contexts=(16, 24), changes=(small,), models=("bmojo", "mamba2"))


@pytest.fixture
def quick(monkeypatch):
    """Rates without their large matrices; the clock still runs."""
    monkeypatch.setattr(job, "measure_rates", lambda *_: Rates(1e11, 1e10))
    monkeypatch.setattr(cases, "DECODED", 3)


def run(plan, folder, told=None):
    return job.run(plan, folder, "bmojo bench", 1, (told if told is not None else []).append)


def names(cell):
    return [entry["name"] for entry in cell["entries"]]


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in ("ops", "stream", "choices")])
def test_every_suite_runs_and_keeps_the_schema(suite, small, quick, tmp_path):
    models = ("transformer", "mamba2", "bmojo")
    results = run(Plan((suite,), lengths=(16,), contexts=(16, 24), changes=(small,), models=models), tmp_path / "out")
    assert results["cells"]
    for cell in results["cells"]:
        assert cell["suite"] == suite
        assert cell["entries"][0]["ratio"]["median"] == 1
        assert all("failed" not in why for why in cell["absent"].values()), cell["absent"]
        assert all(entry["floor_share"] > 0 for entry in cell["entries"] if "floor_share" in entry)
    twins = [cell for cell in results["cells"] if cell["case"] in ("mamba2", "transformer", "gdn")]
    for cell in twins:
        assert any(entry["rival"] for entry in cell["entries"])
        assert len({entry["parameters"] for entry in cell["entries"]}) == 1


def test_every_op_runs(small, quick, tmp_path, monkeypatch):
    """But for the scan that is compiled, which takes a quarter of a minute."""
    real = cases.rivals.associative_scan_s6
    monkeypatch.setattr(cases.rivals, "associative_scan_s6", lambda device, compiled: real(device, False))
    results = run(Plan(("ops",), lengths=(16,), changes=(small,)), tmp_path / "out")
    assert {cell["case"] for cell in results["cells"]} == {
        "ssd", "gated_delta", "s6", "read", "cross_entropy", "rls", "select"}  # fmt: skip
    for cell in results["cells"]:
        assert all(not why.startswith("failed") for why in cell["absent"].values()), cell["absent"]
    s6 = next(cell for cell in results["cells"] if cell["case"] == "s6")
    assert {"bmojo", "mambapy", "associative_scan"} <= set(names(s6))
    assert s6["absent"] == {"mamba-ssm": "mamba-ssm needs a CUDA device"}


def test_choices_are_each_a_model(small, quick, tmp_path):
    results = run(Plan(("choices",), lengths=(16,), changes=(small,)), tmp_path / "out")
    assert [cell["case"] for cell in results["cells"]] == ["training", "decoding"]
    assert all(names(cell) == list(cases.CHOICES) for cell in results["cells"])


def test_a_stream_is_watched_after_its_first_tokens(small):
    config = cases.config_of("bmojo", "tiny", {**small, "num_layers": 1})
    found = stream(config, 11_000, "cpu", 1)
    assert found["growth_bytes"] >= 0
    assert found["samples"][-1][0] == 11_000
    assert stream(config, 600, "cpu", 1)["growth_bytes"] is None


@pytest.mark.slow
def test_a_stream_has_a_process_of_its_own(small, tmp_path):
    results = run(Plan(("stream",), changes=(small,), stream_tokens=600), tmp_path / "out")
    (cell,) = results["cells"]
    assert cell["stream"]["growth_bytes"] is None
    assert cell["settings"]["tokens"] == 600


def test_a_run_that_stops_keeps_its_cells_and_goes_on(plan, quick, tmp_path, monkeypatch):
    real, count = job.measure, []

    def interrupted(*arguments):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(arguments[0].name)
        return real(*arguments)

    monkeypatch.setattr(job, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path)
    kept = job.read_results(tmp_path)
    assert len(kept["cells"]) == 2
    monkeypatch.setattr(job, "measure", real)
    told = []
    results = run(plan, tmp_path, told)
    assert results["cells"][:2] == kept["cells"]
    assert len(told) == len(results["cells"]) - 2
    assert not any(line.startswith(name) for line in told for name in count)
    again = []
    run(plan, tmp_path, again)
    assert again == []


def test_more_values_add_to_it(plan, quick, tmp_path, small):
    before = run(Plan(("train",), lengths=(16,), changes=(small,), models=("bmojo", "mamba2")), tmp_path)
    wider = Plan(("train",), lengths=(16, 64), batches=(1, 2), changes=(small,), models=("bmojo", "mamba2"))
    after = run(wider, tmp_path)
    assert after["cells"][: len(before["cells"])] == before["cells"]
    growth = [cell for cell in after["cells"] if cell["case"] == "growth"]
    assert [names(cell) for cell in growth] == [["16 tokens", "64 tokens"]] * 2
    assert {cell["settings"]["batch"] for cell in after["cells"]} == {1, 2}


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("machine", "threads", 64, "threads was 64, it is 1 here"),
        ("machine", "cpu", "Another", "cpu was 'Another', it is "),
        ("packages", "transformers", None, "transformers was not installed, it is '"),
        (None, "bmojo", "0.0.1", "bmojo was '0.0.1', it is '"),
    ],
)
def test_another_machine_or_version_is_refused(part, name, value, message, results, tmp_path, plan):
    here = job.made_here("bmojo bench")
    (here[part] if part else here)[name] = value
    (tmp_path / "results.json").write_text(json.dumps(here))
    with pytest.raises(CheckpointError, match=message):
        run(plan, tmp_path)


def test_foreign_folders_and_broken_files_are_refused(plan, tmp_path, results):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something that is no benchmark; use another --out"):
        run(plan, tmp_path)
    results["cells"][0]["entries"][0]["seconds"]["median"] = "fast"
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(CheckpointError, match=r"cells\[0\].*"):
        run(plan, tmp_path)


def test_bad_plans_are_refused(small):
    with pytest.raises(ConfigError, match="unknown suite 'trian'; did you mean 'train'"):
        Plan(("trian",))
    with pytest.raises(ConfigError, match="unknown model 'mamba3'; did you mean"):
        Plan(("train",), models=("mamba3",))
    with pytest.raises(ConfigError, match="unknown dtype 'float16'"):
        Plan(("train",), dtype="float16")
    with pytest.raises(ConfigError, match="on a GPU alone"):
        Plan(("train",), dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"multiples of chunk \(8\), got 20; use 24"):
        Plan(("ops",), lengths=(20,), changes=(small,))


def test_unbounded_models_are_absent_at_long_contexts_and_named(small, quick, monkeypatch):
    monkeypatch.setattr(cases, "LONGEST_READ", 16)
    plan = Plan(("decode",), contexts=(24,), changes=(small,), models=("bmojo", "transformer"))
    cell = next(plan.cells())
    found = job.measure(cell, 1, job.stopwatch("cpu"), Rates(1, 1), plan)
    assert names(found) == ["bmojo"]
    assert found["absent"]["transformer"] == "it would have to read 24 tokens at once: at most 16 here"
    assert "transformers, Llama" in found["absent"]
    check_schema(job.made_here("x") | {"cells": [found]}, "bmojo.bench")
