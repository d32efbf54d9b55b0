import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bmojo import BMojoLM, presets
from bmojo.data import read_documents, train_bpe

PROGRAM = "import sys, bmojo.cli; sys.exit(bmojo.cli.main())"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße, und Grüße an alle, die da grüßen.\n".encode() * 20 + b"\xff\xfe\x00")
    return path


@pytest.mark.parametrize("model", ["kt", "ctw"])
def test_built_in_models(bmojo, text, tmp_path, model):
    code, out, err = bmojo("compress", text, "--model", model)
    packed = tmp_path / "text.txt.bmz"
    size = packed.stat().st_size
    assert (code, err) == (0, "")
    assert f"{text.stat().st_size:,} bytes in {size:,}, " in out
    original = text.read_bytes()
    text.unlink()
    code, out, err = bmojo("decompress", packed)
    assert (code, err) == (0, "")
    assert "as they were" in out
    assert text.read_bytes() == original


@pytest.mark.filterwarnings("default:ignored")
def test_a_model_that_is_not_needed_is_told(bmojo, text, tmp_path):
    packed, back = tmp_path / "text.bmz", tmp_path / "back"
    bmojo("compress", text, "--model", "kt", "-o", packed)
    assert "ignored: --model and --tokenizer" in bmojo("decompress", packed, "--model", tmp_path, "-o", back)[2]
    assert back.read_bytes() == text.read_bytes()


def test_ctw_is_shorter_than_the_text(bmojo, text, tmp_path):
    assert bmojo("compress", text, "--model", "ctw", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").stat().st_size < 400 < text.stat().st_size


def test_a_trained_model(bmojo, refused, run_folder, text, tmp_path):
    packed, back = tmp_path / "text.bmz", tmp_path / "back"
    assert bmojo("compress", text, "--model", run_folder, "-o", packed, "--streams", 2, "--context", 64)[0] == 0
    assert "give its folder: --model" in refused("decompress", packed, "-o", back)
    assert bmojo("decompress", packed, "-o", back, "--model", run_folder / "model")[0] == 0
    assert back.read_bytes() == text.read_bytes()


@pytest.mark.slow
def test_in_another_process(bmojo, run_folder, text, tmp_path):
    packed, back = tmp_path / "text.bmz", tmp_path / "back"
    assert bmojo("compress", text, "--model", run_folder, "-o", packed)[0] == 0
    arguments = ["decompress", packed, "--model", run_folder, "-o", back]
    subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], check=True)
    assert back.read_bytes() == text.read_bytes()


@pytest.fixture
def make_model(tmp_path):
    """The folder of a model that knows nothing."""

    def make(name, vocab_size, seed=0):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "ssm_head_dim": 8}
        BMojoLM(presets.bmojo("tiny", vocab_size=vocab_size, **sizes)).save(tmp_path / name)
        return tmp_path / name

    return make


def test_a_model_of_bpe_tokens(bmojo, refused, corpus, make_model, text, tmp_path):
    model, packed, back = make_model("model", 280), tmp_path / "text.bmz", tmp_path / "back"
    train_bpe(read_documents(str(corpus)), 280, model / "tokenizer.json")
    assert bmojo("compress", text, "--model", model, "-o", packed)[0] == 0
    assert bmojo("decompress", packed, "--model", model, "-o", back)[0] == 0
    assert back.read_bytes() == text.read_bytes()
    other = train_bpe(read_documents(str(text), errors="replace"), 280, tmp_path / "other.json").path
    told = refused("decompress", packed, "--model", model, "-o", back, "--force", "--tokenizer", other)
    assert "the file was made by another coder: its tokenizer is" in told


def test_another_model_is_refused(bmojo, refused, make_model, text, tmp_path):
    packed = tmp_path / "text.bmz"
    assert bmojo("compress", text, "--model", make_model("model", 256), "-o", packed)[0] == 0
    assert "text.bmz: the file was made by another coder: its fingerprint is" in refused(
        "decompress", packed, "--model", make_model("other", 256, seed=1), "-o", tmp_path / "back"
    )
    assert not (tmp_path / "back").exists()


def test_an_empty_file(bmojo, tmp_path, run_folder):
    (tmp_path / "empty").write_bytes(b"")
    for model in ("ctw", run_folder):
        assert bmojo("compress", tmp_path / "empty", "--model", model, "--force")[:2] == (
            0,
            f"{tmp_path / 'empty.bmz'}: 0 bytes in {(tmp_path / 'empty.bmz').stat().st_size:,}; 0.0 kB/s\n",
        )
        given = [] if model == "ctw" else ["--model", run_folder]
        assert bmojo("decompress", tmp_path / "empty.bmz", "--force", *given)[0] == 0
        assert (tmp_path / "empty").read_bytes() == b""


def test_what_is_there_is_kept(bmojo, refused, text, tmp_path):
    packed = tmp_path / "text.txt.bmz"
    packed.write_text("mine")
    assert "is there already; overwrite it with --force" in refused("compress", text, "--model", "kt")
    assert packed.read_text() == "mine"
    assert bmojo("compress", text, "--model", "kt", "--force")[0] == 0
    assert "is there already" in refused("decompress", packed)
    assert bmojo("decompress", packed, "--force")[0] == 0


def test_wrong_input(refused, text, tmp_path):
    packed = tmp_path / "bad.bmz"
    packed.write_bytes(b"bmz\x01 something else")
    assert f"{packed}: the file is damaged or cut off within its head" in refused("decompress", packed)
    assert "is no file of `bmojo compress`" in refused("decompress", text, "-o", tmp_path / "out")
    assert "does not end in .bmz; name the file to write" in refused("decompress", text)
    assert "No such file" in refused("compress", tmp_path / "nothing", "--model", "kt")
    assert "no checkpoint at" in refused("compress", text, "--model", tmp_path / "nothing")
    assert "is a folder" in refused("compress", text, "--model", "kt", "-o", tmp_path)
    assert "Is a directory" in refused("compress", ".", "--model", "kt")
    assert "can't write to the folder" in refused("compress", text, "--model", "kt", "-o", tmp_path / "no" / "out")
    assert "leave them out for kt" in refused("compress", text, "--model", "kt", "--streams", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stopped_it_leaves_nothing(tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(20_000_000))
    program = "import bmojo.universal.compress; print(flush=True); " + PROGRAM
    arguments = [sys.executable, "-c", program, "compress", str(big), "--model", "ctw"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "\n"
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "bmojo: stopped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["big"]
