"""Text into a store and out of it again: `bmojo remember`, `bmojo generate --store`."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from bmojo.cli import main
from bmojo.memory.engines import open_store

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/storage.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def reader(tmp_path_factory, corpus, run_options) -> Path:
    """A model trained to read from storage."""
    out = tmp_path_factory.mktemp("runs") / "reader"
    options = [*run_options, "--seq-len", "128", "--set", "storage_layers=-1"]
    assert main(["train", "--out", str(out), "--text", str(corpus), *options]) == 0
    return out


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + "so it goes on, and on. " * 30)
    return folder


def sources(store: Path) -> dict:
    with open_store(store) as engine:
        return engine.sources()


def test_files_are_read_once(bmojo, reader, texts, tmp_path):
    store = tmp_path / "mem"
    code, out, err = bmojo("remember", reader, texts, "--store", store)
    assert code == 0, err
    tokens = sum(path.stat().st_size for path in texts.iterdir())
    assert out == f"4 documents read ({tokens:,} tokens), 0 were there already\n"
    found = sources(store)
    assert sorted(found) == [str(texts / f"{i}.txt") for i in range(4)]
    assert sum(source["tokens"] for source in found.values()) == tokens
    assert bmojo("remember", reader, texts, "--store", store)[1].startswith("0 documents read (0 tokens), 4 were")
    (texts / "2.txt").write_text("Another text now. " * 20)
    assert bmojo("remember", reader, texts / "2.txt", texts, "--store", store)[1].startswith("1 documents read")
    assert sources(store)[str(texts / "2.txt")]["tokens"] == 360


def test_generate_finds_cites_and_hands_over(bmojo, reader, texts, tmp_path):
    store = tmp_path / "mem"
    bmojo("remember", reader, texts, "--store", store)
    options = "--prompt", "Text 3: so it goes " * 8, "--max-new-tokens", 40, "--temperature", 0
    plain = bmojo("generate", reader, *options)[1]
    code, out, err = bmojo("generate", reader, "--store", store, "--cite", *options)
    assert code == 0, err
    assert out != plain
    head, *spans = err.splitlines()
    assert re.fullmatch(r"bmojo: \d+% of the attention of 39 tokens went to stored text", head)
    assert re.fullmatch(r" +\d+\.\d%  \S+\.txt \[\d+, \d+\): .*", spans[0])
    assert bmojo("generate", reader, "--store", store, *options)[1] == out
    assert len(sources(store)) == 4
    for _ in range(2):
        code, _, err = bmojo("generate", reader, "--store", store, "--stream", "diary", *options)
        assert code == 0, err
    assert sources(store)["diary"]["tokens"] == (2 * (152 + 40) - 1) // 64 * 64
    assert len(sources(store)) == 5
    kept = "--stream", "diary", "--read-only"
    assert bmojo("generate", reader, "--store", store, *kept, *options)[0] == 0
    assert sources(store)["diary"]["tokens"] == (2 * (152 + 40) - 1) // 64 * 64
    for way in (["--stride", 4], ["--stride", 64, "--blocks", 1]):
        assert bmojo("generate", reader, "--store", store, *way, *options)[0] == 0


def test_decay_is_learned_and_kept(bmojo, refused, reader, texts, tmp_path):
    store = tmp_path / "mem"
    bmojo("remember", reader, texts, "--store", store)
    options = "--store", store, "--prompt", "Text 3: so it goes " * 8, "--max-new-tokens", 40, "--temperature", 0
    keep = "--streams-dir", tmp_path, "--stream"
    for _ in range(2):
        code, _, err = bmojo("generate", reader, *options, *keep, "diary", "--decay")
        assert code == 0, err
    assert "half-life" in bmojo("store", "stats", "--store", store)[1]
    bmojo("generate", reader, *options, *keep, "plain")
    assert "begun without --decay" in refused("generate", reader, *options, *keep, "plain", "--decay")
    assert "give --store" in refused("generate", reader, "--decay", "--prompt", "x")
    bmojo("store", "forget", "--store", store, "--source", "bmojo:decay")
    assert "half-life" not in bmojo("store", "stats", "--store", store)[1]


def test_forgotten_text_is_not_found(bmojo, reader, texts, tmp_path):
    store = tmp_path / "mem"
    bmojo("remember", reader, texts, "--store", store)
    for i in range(4):
        bmojo("store", "forget", "--store", store, "--source", texts / f"{i}.txt")
    options = "--prompt", "Text 3: so it goes " * 8, "--max-new-tokens", 40, "--temperature", 0
    alone = bmojo("generate", reader, "--store", tmp_path / "empty", "--stream", "alone", *options)[1]
    assert bmojo("generate", reader, "--store", store, *options)[1] == alone


def test_what_is_wrong_is_said(bmojo, refused, reader, run_folder, texts, tmp_path):
    store = tmp_path / "mem"
    assert "no text at 'nothing'" in refused("remember", reader, "nothing", "--store", store)
    assert "is no store of blocks" in refused("generate", reader, "--store", store, "--prompt", "x")
    assert "give --store" in refused("generate", reader, "--cite", "--prompt", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a command line prints them
        code, _, err = bmojo("remember", run_folder, texts, "--store", store)
    assert code == 0
    assert "layer 0 does. A short training with --set storage_layers=0 teaches it" in err
    assert "weights: the store has" in refused("remember", reader, texts, "--store", store)
    with open_store(store, mode="a"):
        assert "is being written" in refused("remember", run_folder, texts, "--store", store)
    assert "storage_stride must divide" in refused("generate", run_folder, "--store", store, "--stride", 7)
    (store / "log-1.lmdb").write_bytes((store / "log-1.lmdb").read_bytes()[:-4096])
    assert "store verify --repair" in refused("generate", run_folder, "--store", store, "--prompt", "x")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_broken_off_it_goes_on(bmojo, reader, tmp_path, how):
    """Killed, or by Ctrl-C: what was read stays, and the rest is read by the same command."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        (texts / f"{i:03}.txt").write_text(f"{i} is a number. " * 200)
    store = tmp_path / "mem"
    command = ["remember", str(reader), str(texts), "--store", str(store), "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "bmojo", *command], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300  # on a busy machine
    while time.monotonic() < deadline and not (store / "log-1.lmdb").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and (store / "log-1.lmdb").stat().st_size < 2e6:
        time.sleep(0.05)
    process.send_signal(how)
    err = process.communicate()[1].decode()
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert how == signal.SIGKILL or "run the same command again to go on" in err
    code, out, err = bmojo(*command)
    assert code == 0, err
    there = int(re.search(r"(\d+) were there already", out)[1])
    assert 0 < there < 300
    assert {entry["tokens"] for entry in sources(store).values()} == {200 * 15, 200 * 16, 200 * 17}
    assert len(sources(store)) == 300


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "README.md", tmp_path)
    exec("".join(code for kind, code in BLOCKS if kind == "python"), {})
    for command in "".join(code for kind, code in BLOCKS if kind == "bash").splitlines():
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
