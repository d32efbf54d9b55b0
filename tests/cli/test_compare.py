import dataclasses
import io

import pytest
from rich.console import Console

from bmojo.cli.compare import Bars
from bmojo.compare import job
from bmojo.compare.profiles import PROFILES
from bmojo.compare.results import read_results
from bmojo.train import TrainSettings


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """`quick` of one step, in a folder of its own."""
    quick = PROFILES["quick"]
    step = TrainSettings(steps=1, batch_size=1, seq_len=128)
    text = dataclasses.replace(quick.text, train=step, eval_bytes=500, position_documents=1)
    monkeypatch.setitem(PROFILES, "quick", dataclasses.replace(quick, text=text))
    monkeypatch.setattr(job, "CONTEXTS", [16])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(*arguments):
    return ["compare", "--models", "swa", "--suite", "text", "--name", "run", "--threads", "1", *arguments]


def test_prints_the_table_and_where_the_report_is(small, corpus, bmojo):
    code, out, err = bmojo(*compare("--text", corpus))
    assert code == 0
    assert "`swa`" in out
    assert "report: runs/compare/run/report.html" in out
    assert (small / "runs/compare/run/report.html").exists()
    (line,) = err.splitlines()
    assert line.startswith("finished text/swa")
    assert "bits per byte" in line
    assert read_results(small / "runs/compare/run/results.json")["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "swa,bmjo"], "unknown model 'bmjo'; did you mean 'bmojo'?"),
        (["--models", "swa,swa"], "a model is named twice in swa,swa; name each once"),
        (["--models", ","], "no model chosen; known: bmojo"),
        (["--suite", "recal"], "unknown suite 'recal'; did you mean 'recall'?"),
        (["--profile", "quik"], "unknown profile 'quik'; did you mean 'quick'?"),
        (["--tokenizer", "byts"], "did you mean 'bytes'"),
        (["--errors", "ignore"], "errors must be 'strict' or 'replace', got 'ignore'"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_options_that_cannot_be_used_are_refused(small, corpus, refused, arguments, message):
    assert message in refused(*compare("--text", corpus, *arguments))
    assert not list((small / "runs").rglob("job.json"))


BAD_TEXT = {
    "missing": (None, "no text at 'text.txt'"),
    "empty": (b"", "'text.txt' is empty"),
    "blank": (b" \n\n", "'text.txt' is empty"),
    "not UTF-8": (b"abcdefgh\n" * 40 + b"\xff" + b"more\n" * 50, "text.txt: byte 360 (0xff) is not valid UTF-8"),
    "short": (b"short\nshort\n", "text shorter than a window: 11 training tokens, expected at least 128"),
    "one letter": (b"a", "text too short to hold some of it out"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_text_that_cannot_be_used_is_refused_and_leaves_the_name_free(small, corpus, refused, bmojo, content, message):
    if content is not None:
        (small / "text.txt").write_bytes(content)
    assert message in refused(*compare("--text", "text.txt"))
    assert not (small / "runs/compare/run/job.json").exists()
    assert bmojo(*compare("--text", corpus))[0] == 0
    assert (small / "runs/compare/run/report.html").exists()


def test_a_folder_without_text_is_refused(small, refused):
    (small / "empty").mkdir()
    (small / "empty" / "picture.png").write_bytes(b"\x89PNG")
    assert "folder 'empty' holds no readable text; expected files that end in .txt" in refused(
        *compare("--text", "empty")
    )
    assert not (small / "runs").exists()


def test_another_job_under_the_same_name_is_refused(corpus, bmojo, refused):
    assert bmojo(*compare("--text", corpus))[0] == 0
    line = refused(*compare("--text", corpus, "--seed", "1"))
    assert "runs/compare/run was made with another seed: 0 there, 1 here; use another --name" in line


def test_a_stopped_run_says_how_to_go_on(corpus, bmojo, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_report", stop)
        code, out, err = bmojo(*compare("--text", corpus))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "bmojo: stopped; run the same command again to go on"
    assert bmojo(*compare("--text", corpus))[0] == 0


def test_a_terminal_shows_bars():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    entry = {"name": "text/swa", "suite": "text", "eval": {"bits_per_byte": 1.5}, "train": {"tokens_per_second": 2000}}
    with Bars(console) as bars:
        bars.stage("reading the text")
        bars.start(13)
        bars.model("text/swa", 10)
        for step in range(1, 11):
            bars.step(step, 5 - step / 10)
        bars.stage("scoring held-out text")
        bars.progress.refresh()
        bars.done(entry, 13)
        bars.stage("writing the report")
    shown = console.file.getvalue()
    assert "scoring held-out text" in shown
    assert "1.500 bits per byte, 2,000 tokens/s" in shown
    assert "100%" in shown


def test_several_processes_are_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "compare runs in one process" in refused("compare")
