"""Every code block of the README runs; its table is that of the committed results."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bmojo.cli import main
from bmojo.compare import job as job_module
from bmojo.compare.profiles import PROFILES, Profile, RecallPlan, TextPlan
from bmojo.compare.report import summary_table
from bmojo.compare.results import read_results
from bmojo.train import TrainSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SMALL = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "num_layers": 2, "ssm_head_dim": 16,
         "window": 16, "chunk_size": 8}  # fmt: skip
SETTINGS = {"steps": 2, "batch_size": 2, "checkpoint_every": 2}
SHORT = Profile(  # of the quick profile, so that its commands end within seconds
    text=TextPlan(size="tiny", train=TrainSettings(seq_len=48, **SETTINGS), changes=SMALL, eval_bytes=600,
                  position_documents=2),
    recall=RecallPlan(size="tiny", train=TrainSettings(seq_len=32, **SETTINGS), changes=SMALL, eidetic_slots=8,
                      pairs=4, few=2, keys=8, eval_rows=2),
)  # fmt: skip


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text"}


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"], ids=lambda code: code[:20])
def test_python_runs_as_it_stands(code, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_example_has_twelve_lines_at_most():
    first = next(code for kind, code in BLOCKS if kind == "python")
    assert len(first.strip().splitlines()) <= 12


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROFILES, "quick", SHORT)
    monkeypatch.setattr(job_module, "CONTEXTS", [16, 64])
    shutil.copy(ROOT / "README.md", tmp_path)
    for command in "".join(code for kind, code in BLOCKS if kind == "bash").splitlines():
        program, *arguments = shlex.split(command)
        if program == "make":  # what it runs is what runs here
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
            continue
        assert program == "bmojo"
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    for name in ("quick-stdlib", "two", "mine"):
        assert (tmp_path / "runs" / "compare" / name / "report.html").is_file()


def test_links_and_pictures_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_is_that_of_the_results():
    marked = re.search(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", README, flags=re.DOTALL)
    assert marked is not None
    assert marked[2].strip() == summary_table(read_results(ROOT / marked[1])).strip()
