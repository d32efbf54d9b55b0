"""What docs/streams.md shows runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from bmojo.cli import main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/streams.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    exec("".join(code for kind, code in BLOCKS if kind == "python"), {})
    capsys.readouterr()
    for command in "".join(code for kind, code in BLOCKS if kind == "bash").splitlines():
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/mine/model/streams/diary.safetensors").is_file()
    assert (tmp_path / "elsewhere/diary.safetensors").is_file()
