"""What docs/universal.md and docs/compression.md show runs, on smaller tables and models."""

import re
import shlex
from pathlib import Path

import pytest

from bmojo import BMojoLM, presets
from bmojo.cli import main

ROOT = Path(__file__).parents[2]


def blocks(page, kind):
    text = (ROOT / "docs" / page).read_text("utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(vocab_size):
    return BMojoLM(presets.bmojo("tiny", vocab_size=vocab_size, num_layers=1))


def test_universal(capsys):
    (code,) = blocks("universal.md", "python")
    for stated, small in (("n_bits=16", "n_bits=8"), ("depth=13", "depth=8"), ("phases=24", "phases=8")):
        assert stated in code
        code = code.replace(stated, small)
    exec(code, {"model": model(3)})
    model(3).save("MODEL")
    text = (ROOT / "docs/universal.md").read_text("utf-8")
    commands = re.findall(r"^    (bmojo universal .*?)(?:  #.*)?$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        small = command.replace("--bits 16 --depth 13", "--bits 8 --depth 8")
        assert main(shlex.split(small)[1:]) == 0, capsys.readouterr().err
    assert Path("table.png").is_file()


def test_compression(capsys):
    model(256).save("runs/my-run/model")
    Path("notes.txt").write_bytes(b"This is to be short.")
    commands, code = blocks("compression.md", "bash")[0], blocks("compression.md", "python")[0]
    for command in commands.splitlines():
        words = shlex.split(command, comments=True)
        assert main([*words[1:], "--force"]) == 0, capsys.readouterr().err
    names = {"data": b"This is to be short.", "tokenizer": None}
    exec(code, names)
    assert names["data"] == b"This is to be short."
