"""`bmojo.train.train` and `bmojo train` under torchrun: the batch is shared, the losses are one process'."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import train_script

from bmojo import BMojoLM
from bmojo.cli import main

pytestmark = pytest.mark.slow
SCRIPT = Path(train_script.__file__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process: model, record, losses by step."""
    return train_script.run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(torchrun, tmp_path_factory):
    """The folder of a run of two processes that was sent SIGTERM after its first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    running = torchrun(2, SCRIPT, folder, folder / "losses.json", 7, wait=False)
    try:
        until = time.monotonic() + 120
        while not (folder / "checkpoints/checkpoint-5/complete").exists():
            assert running.poll() is None, running.communicate()[1][-4000:]
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
    finally:
        running.kill()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-5"]
    return folder


def same(model, other):
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=1e-4, msg=name)


def test_what_two_processes_began_one_ends(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    model, record, losses = train_script.run(tmp_path)
    assert list(losses) == list(range(6, 13))
    assert record.loss == [[step, pytest.approx(loss, abs=1e-5, rel=0)] for step, loss in whole[1].loss]
    same(model, whole[0])


def test_what_two_processes_began_two_end(whole, stopped, tmp_path, torchrun):
    folder, results = tmp_path / "run", tmp_path / "losses.json"
    shutil.copytree(stopped, folder)
    done = torchrun(2, SCRIPT, folder, results)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (0, "", "")
    losses = {int(step): loss for step, loss in json.loads(results.read_text()).items()}
    assert losses == pytest.approx({step: whole[2][step] for step in range(6, 13)}, abs=1e-5, rel=0)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "train.json"]
    same(BMojoLM.load(folder / "model"), whole[0])
    assert train_script.run(folder)[1].loss == [
        [step, pytest.approx(loss, abs=1e-5, rel=0)] for step, loss in whole[1].loss
    ]


def test_the_command_line(tmp_path, torchrun):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"Document {i} tells of the number {i} ünd of nothing else.\n" * 4)
    options = ["--text", str(text), "--steps", "6", "--batch-size", "4", "--seq-len", "32", "--held-out", "0.3",
               "--threads", "1", "--tokenizer", "bpe:260", "--set", "hidden_size=32", "--set", "num_heads=2",
               "--set", "num_layers=1", "--set", "ssm_head_dim=16"]  # fmt: skip
    assert main(["train", "--out", str(tmp_path / "one"), *options]) == 0
    done = torchrun(2, "-m", "bmojo", "train", "--out", tmp_path / "two", *options)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["bmojo", "loss", "in", "next:"]
    folders = [tmp_path / name for name in ("one", "two")]
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert names[0] == names[1] == {"run.json", "tokenizer.json", "data", "model", "train.json", "tensorboard"}
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1
    one, two = (json.loads((folder / "train.json").read_text())["record"]["loss"] for folder in folders)
    assert two == [[step, pytest.approx(loss, abs=1e-5, rel=0)] for step, loss in one]
    same(*(BMojoLM.load(folder / "model") for folder in folders))
