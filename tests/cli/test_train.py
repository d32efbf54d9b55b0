import errno
import json
import os
import shutil

import pytest

from bmojo import BMojoLM
from bmojo.train import trainer


@pytest.fixture
def arguments(run_options):
    """The command line of a run."""

    def make(out, text, *more):
        return ["train", "--out", out, "--text", text, *run_options, *more]

    return make


def test_writes_a_run_folder_and_says_what_is_next(arguments, tmp_path, corpus, bmojo):
    code, out, _ = bmojo(*arguments(tmp_path / "run", corpus, "--tokenizer", "bpe:260"))
    assert code == 0
    assert "192 tokens" in out
    assert f"next: bmojo eval {tmp_path / 'run'}" in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "tokenizer.json", "data", "model", "train.json", "tensorboard"}
    assert BMojoLM.load(tmp_path / "run" / "model").config.vocab_size == 260


def test_the_same_command_returns_at_once(arguments, run_folder, corpus, bmojo):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    code, out, _ = bmojo(*arguments(run_folder, corpus))
    assert code == 0
    assert "192 tokens" in out
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_run_that_was_stopped_goes_on(arguments, tmp_path, corpus, bmojo, run_folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BMojoLM, "save", stop)
        code, _, err = bmojo(*arguments(tmp_path / "run", corpus))
    assert (code, err.splitlines()[-1]) == (130, "bmojo: stopped; run the same command again to go on")
    code, _, _ = bmojo("eval", tmp_path / "run")
    assert code == 2
    assert bmojo(*arguments(tmp_path / "run", corpus))[0] == 0
    assert json.loads((tmp_path / "run/train.json").read_text())["record"]["tokens_trained"] == 192
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (tmp_path / "run", run_folder)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "4"], "was made with steps=3, this run has steps=4"),
        (["--set", "window=128"], "was made with window=64, this run has window=128"),
        (["--held-out", "0.5"], "was made with held_out=0.3, this run has held_out=0.5"),
        (["--tokenizer", "bpe:300"], 'was made with tokenizer="bytes", this run has tokenizer="bpe:300"'),
    ],
)
def test_another_run_in_the_same_folder_is_refused(arguments, run_folder, corpus, refused, more, message):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    assert message in refused(*arguments(run_folder, corpus, *more))
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_foreign_folder_is_refused(arguments, tmp_path, corpus, refused):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds other things than a run" in refused(*arguments(tmp_path, corpus))
    assert "is a file; choose a new folder" in refused(*arguments(tmp_path / "thesis.tex", corpus))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["model", "checkpoints", "tensorboard", "train.json"])
def test_what_another_program_left_is_not_overwritten(arguments, tmp_path, corpus, refused, name):
    (tmp_path / name).mkdir()
    assert f"{name}, but no run.json; choose a new folder" in refused(*arguments(tmp_path, corpus))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_tokenizer_that_a_failed_run_left_does_no_harm(arguments, tmp_path, corpus, refused, bmojo):
    out, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("short\nshort\n")
    assert "shorter than a window" in refused(*arguments(out, text, "--tokenizer", "bpe:258"))
    assert (out / "tokenizer.json").exists()
    assert bmojo(*arguments(out, corpus))[0] == 0
    assert not (out / "tokenizer.json").exists()


def test_a_begun_run_without_its_text_is_refused(arguments, tmp_path, run_folder, corpus, refused):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/data")
    line = refused(*arguments(tmp_path / "run", corpus))
    assert "can't go on without the text that it began with; use another folder" in line
    assert not (tmp_path / "run/data").exists()


def test_text_that_cannot_be_used_is_refused(arguments, tmp_path, refused, bmojo):
    out = tmp_path / "run"
    assert "no text at" in refused(*arguments(out, tmp_path / "missing.txt"))
    (tmp_path / "empty").mkdir()
    assert "holds no readable text" in refused(*arguments(out, tmp_path / "empty"))
    text = tmp_path / "text.txt"
    text.write_text("")
    assert "is empty" in refused(*arguments(out, text))
    text.write_text("short\nshort\n")
    assert "text shorter than a window" in refused(*arguments(out, text))
    text.write_bytes(b"abcdefgh\n" * 40 + b"\xff" + b"more\n" * 50)
    line = refused(*arguments(out, text))
    assert "byte 360 (0xff) is not valid UTF-8" in line
    assert "--errors replace" in line
    assert not (out / "run.json").exists()
    assert bmojo(*arguments(out, text, "--errors", "replace"))[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "mamba3"], "unknown model 'mamba3'; did you mean 'mamba'?"),
        (["--size", "teeny"], "unknown size 'teeny'; did you mean 'tiny'?"),
        (["--set", "vocab_size=9"], "vocab_size comes from the tokenizer"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--errors", "ignore"], "errors must be 'strict' or 'replace', got 'ignore'"),
        (["--tokenizer", "bpe:many"], "bpe:SIZE takes a whole number of tokens"),
        (["--tokenizer", "byts"], "did you mean 'bytes'"),
        (["--held-out", "2"], "held_out must be a fraction between 0 and 1, got 2"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(arguments, tmp_path, corpus, refused, more, message):
    assert message in refused(*arguments(tmp_path / "run", corpus, *more))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.filterwarnings("default")
def test_changed_text_is_noted(arguments, tmp_path, bmojo):
    text = tmp_path / "text.txt"
    text.write_text("one line of text\n" * 40)
    assert bmojo(*arguments(tmp_path / "run", text))[0] == 0
    text.write_text("another text\n" * 60)
    code, _, err = bmojo(*arguments(tmp_path / "run", text))
    assert (code, err) == (
        0,
        f"bmojo: warning: {text} has changed; this run goes on with the text that it began with\n",
    )


def test_a_full_disk_is_one_line(arguments, tmp_path, corpus, monkeypatch, bmojo):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.Checkpoints, "complete", full)
    code, _, err = bmojo(*arguments(tmp_path / "run", corpus))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("bmojo: error")]
    assert "can't write the checkpoint of step 3" in line
    assert "Traceback" not in err
