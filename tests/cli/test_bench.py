import json
import re
import shlex
from pathlib import Path

import pytest

from bmojo.bench import job
from bmojo.bench.floor import Rates

DOCS = (Path(__file__).parents[2] / "docs/bench.md").read_text(encoding="utf-8")
SMALL = ["--set", "hidden_size=32", "--set", "num_heads=2", "--set", "intermediate_size=64", "--set", "ssm_head_dim=16",
         "--set", "chunk_size=16", "--models", "bmojo,mamba2", "--rounds", "1", "--threads", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "measure_rates", lambda *_: Rates(1e11, 1e10))
    return tmp_path


def test_measures_reports_and_goes_on(bmojo, in_a_folder_of_its_own):
    command = ["bench", "train", *SMALL, "--lengths", "16,32", "--set", "window=16,32", "--set", "fading_span=16"]
    code, out, err = bmojo(*command)
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("train family")]
    assert len(lines) == 4
    assert "time 32" in lines[1]
    assert "window 16" in lines[1]
    assert re.search(r"bmojo [\d.]+ ms \(x1.00\), mamba2 [\d.]+ ms \(x[\d.]+\)", lines[0])
    assert "| `bmojo` over `mamba2`, training |" in out
    assert "in runs/bench: results.json, report.md, figures/" in out
    folder = in_a_folder_of_its_own / "runs/bench"
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "report.md").is_file()
    code, out, err = bmojo(*command, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == results
    code, out, err = bmojo("bench", "report", "runs/bench", "runs/bench/results.json", "--out", "both")
    assert (code, err) == (0, "")
    assert "in both: " in out
    assert (in_a_folder_of_its_own / "both/figures/speed_2.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown suite 'trian'; did you mean 'train'?"),
        (["train", "--lengths", "1.5"], "--lengths must be a whole number, got '1.5'"),
        (["train", "--lengths", "0"], "--lengths must be whole numbers of at least 1, got '0'; for example"),
        (["train", "--batch", ","], "--batch must be whole numbers of at least 1, got ','"),
        (["ops", "--lengths", "100"], "the lengths of ops must be multiples of chunk (64), got 100; use 128"),
        (["train", "--set", "windows=3"], "unknown setting 'windows'; did you mean 'window'?"),
        (["train", "--set", "window"], "--set takes NAME=VALUE,VALUE,..., got 'window'"),
        (["train", "--set", "window=100"], "window must be a positive multiple of chunk (64), got 100"),
        (["train", "--size", "large"], "unknown size 'large'"),
        (["train", "--models", "mamba3"], "unknown model 'mamba3'; did you mean"),
        (["train", "--dtype", "bfloat16"], "bfloat16 is measured on a GPU alone"),
    ],
)
def test_what_can_be_mended_is_one_line(bmojo, arguments, message, in_a_folder_of_its_own):
    code, out, err = bmojo("bench", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("bmojo: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (in_a_folder_of_its_own / "runs").exists()


def test_a_report_needs_results(bmojo):
    code, _, err = bmojo("bench", "report", "nowhere")
    assert code == 2
    assert "nowhere: expected a results.json, got No such file or directory" in err


def test_the_docs_name_every_suite_and_their_commands_are_ours(bmojo):
    from bmojo.bench.cases import SUITES

    for suite in SUITES:
        assert f"| `{suite}` |" in DOCS
    options = bmojo("bench", "--help")[1]
    for line in re.findall(r"^    (bmojo bench .*)$", DOCS, flags=re.MULTILINE):
        for word in shlex.split(line, comments=True):
            assert not word.startswith("--") or word in options, line
