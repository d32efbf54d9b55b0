import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from bmojo import BMojoLM, presets
from bmojo.errors import BMojoError, CheckpointError, MissingPackageError
from bmojo.train import TrainSettings, hf, train
from bmojo.train import checkpoints as checkpoints_module
from bmojo.train.memory import peak_memory_bytes, reset_peak_memory

SETTINGS = TrainSettings(steps=12, batch_size=2, seq_len=24, checkpoint_every=5, log_every=4)


def rows(i):
    tokens = np.random.default_rng(i).integers(0, 64, 25)
    return {"tokens": tokens[:-1], "labels": tokens[1:]}


def new_model(**changes):
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "window": 8, "chunk_size": 8}
    return BMojoLM(presets.bmojo("tiny", ssm_head_dim=16, eidetic_slots=4, **{**fields, **changes}))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: folder, model, record, losses."""
    folder, model, losses = tmp_path_factory.mktemp("whole"), new_model(), []
    record = train(model, rows, SETTINGS, folder, on_step=lambda step, loss: losses.append(loss))
    return folder, model, record, losses


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stop_at(last, losses):
    def on_step(step, loss):
        losses.append(loss)
        if step == last:
            raise KeyboardInterrupt

    return on_step


def test_leaves_model_record_and_log_and_no_checkpoints(whole, capfd):
    folder, model, record, losses = whole
    assert sorted(path.name for path in folder.iterdir()) == ["model", "tensorboard", "train.json"]
    assert same_weights(BMojoLM.load(folder / "model"), model)
    assert [step for step, _ in record.loss] == [4, 8, 12]
    np.testing.assert_allclose([value for _, value in record.loss], np.reshape(losses, (3, 4)).mean(1))
    assert record.tokens_trained == 12 * 2 * 24
    assert record.tokens_per_second > 0
    assert 0 < record.seconds < 60
    assert record.peak_memory_bytes > 2**20
    content = json.loads((folder / "train.json").read_text())
    assert content["settings"] == SETTINGS.to_dict()
    assert content["config"] == model.config.to_dict()
    assert not same_weights(new_model(), model)


def test_prints_nothing(tmp_path, capfd):
    train(new_model(), rows, TrainSettings(steps=2, batch_size=1, seq_len=24), tmp_path, tensorboard=False)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "tensorboard").exists()


def test_same_seed_gives_the_same_losses_to_the_bit(whole, tmp_path):
    model, losses = new_model(), []
    train(model, rows, SETTINGS, tmp_path, on_step=lambda step, loss: losses.append(loss), tensorboard=False)
    assert losses == whole[3]
    assert same_weights(model, whole[1])


@pytest.mark.parametrize("stops", [(3,), (7, 11), (12,)], ids=str)
def test_an_interrupted_run_goes_on_exactly(whole, tmp_path, stops):
    first, at = [], 0
    for stop in stops:
        part = []
        with pytest.raises(KeyboardInterrupt):
            train(new_model(), rows, SETTINGS, tmp_path, on_step=stop_at(stop, part), tensorboard=False)
        first[at:] = part
        at = stop // 5 * 5
    model, rest = new_model(), []
    record = train(model, rows, SETTINGS, tmp_path, on_step=lambda step, loss: rest.append(loss), tensorboard=False)
    assert first[:at] + rest == whole[3]
    assert same_weights(model, whole[1])
    assert record.loss == whole[2].loss
    assert record.tokens_trained == whole[2].tokens_trained


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer import SETTINGS, new_model, rows, train
import numpy as np
import torch
torch.set_num_threads(1)
save = np.save
def killing(path, array):
    if len(array) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, array)
np.save = killing
train(new_model(), rows, SETTINGS, Path({folder!r}), tensorboard=False)
"""


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_exactly(whole, tmp_path):
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = tmp_path / "checkpoints"
    assert [(left / f"checkpoint-{step}" / "complete").exists() for step in (5, 10)] == [True, False]
    assert (left / "checkpoint-10" / "model.safetensors").exists()
    model, steps = new_model(), []
    record = train(model, rows, SETTINGS, tmp_path, on_step=lambda step, loss: steps.append(step), tensorboard=False)
    assert steps[0] == 6
    assert same_weights(model, whole[1])
    assert record.loss == whole[2].loss


def test_keeps_two_checkpoints(tmp_path):
    settings = TrainSettings(steps=12, batch_size=1, seq_len=24, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), rows, settings, tmp_path, on_step=stop_at(9, []), tensorboard=False)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-8"}


def test_a_finished_run_is_not_trained_again(whole):
    folder, model, record, _ = whole
    again = new_model()

    def refuse(i):
        raise AssertionError("no row should be read")

    assert train(again, refuse, SETTINGS, folder) == record
    assert same_weights(again, model)


def test_a_folder_of_another_run_is_refused_and_left_alone(whole, tmp_path):
    folder, *_ = whole
    before = (folder / "train.json").read_bytes()
    other = dataclasses.replace(SETTINGS, learning_rate=1e-4)
    with pytest.raises(CheckpointError, match=r"learning_rate=0\.003, this run has learning_rate=0\.0001"):
        train(new_model(), rows, other, folder)
    with pytest.raises(CheckpointError, match="eidetic_slots=4, this run has eidetic_slots=2"):
        train(BMojoLM(new_model().config.replace(eidetic_slots=2)), rows, SETTINGS, folder)
    assert (folder / "train.json").read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), rows, SETTINGS, tmp_path, on_step=stop_at(6, []), tensorboard=False)
    with pytest.raises(CheckpointError, match=r"checkpoint-5 was made with learning_rate=0\.003"):
        train(new_model(), rows, other, tmp_path, tensorboard=False)
    assert (tmp_path / "checkpoints" / "checkpoint-5" / "complete").exists()


PARTS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "progress.npy"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its second checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), rows, SETTINGS, folder, on_step=stop_at(11, []), tensorboard=False)
    return folder


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_checkpoint_is_refused(stopped, tmp_path, part, share):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints/checkpoint-10"
    content = (newest / part).read_bytes()
    (newest / part).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        CheckpointError, match=r"checkpoint-10 is damaged \(.+\); delete it to go on from the one"
    ) as got:
        train(new_model(), rows, SETTINGS, tmp_path, tensorboard=False)
    assert "\n" not in str(got.value)
    assert newest.exists()


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_one_of_its_parts_is_refused(stopped, tmp_path, part):
    """Transformers would go on with a new optimiser, or other random numbers."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/checkpoint-10" / part).unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint-10 is damaged .{part} is missing.; delete it to go on"):
        train(new_model(), rows, SETTINGS, tmp_path, tensorboard=False)


@pytest.mark.parametrize("change", [{"peak_memory_bytes": None}, {"peak_memory_bytes": "much"}, None], ids=str)
def test_a_marker_that_lacks_something_is_refused(stopped, tmp_path, change):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    marker = tmp_path / "checkpoints/checkpoint-10/complete"
    content = json.loads(marker.read_text())
    if change is None:
        del content["peak_memory_bytes"]
    marker.write_text(json.dumps(content | (change or {})))
    with pytest.raises(CheckpointError, match=r"checkpoint-10 is damaged \(.+\); delete it to go on from the one"):
        train(new_model(), rows, SETTINGS, tmp_path, tensorboard=False)


def test_another_number_of_processes_needs_no_random_states_of_its_own(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints/checkpoint-10"
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    marker = newest / "complete"
    marker.write_text(marker.read_text().replace("rng_state", "rng_state_0"))
    model = new_model()
    train(model, rows, SETTINGS, tmp_path, tensorboard=False)
    assert same_weights(model, whole[1])


def test_without_its_damaged_checkpoint_a_run_goes_on(whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-10")
    model = new_model()
    train(model, rows, SETTINGS, tmp_path, tensorboard=False)
    assert same_weights(model, whole[1])


def test_an_error_of_the_rows_is_not_taken_for_damage(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)

    def broken(i):
        raise RuntimeError("no such row")

    with pytest.raises(RuntimeError, match="no such row"):
        train(new_model(), broken, SETTINGS, tmp_path, tensorboard=False)


@pytest.mark.parametrize("content", [{}, {"settings": 3}, {"settings": ["steps"]}, {"settings": "steps"}])
def test_a_foreign_record_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"was made with steps=null, this run has steps=12"):
        checkpoints_module.require_same_run(content, {"settings": SETTINGS.to_dict()}, tmp_path)


def test_several_gpus_train_as_one(whole, tmp_path, monkeypatch):
    arguments = hf.TrainingArguments

    def of_two_gpus(**fields):
        args = arguments(**fields)
        args._n_gpu = 2
        return args

    monkeypatch.setattr(hf, "TrainingArguments", of_two_gpus)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", None)  # what must not be used
    model = new_model()
    train(model, rows, SETTINGS, tmp_path, tensorboard=False)
    assert same_weights(model, whole[1])


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"train\.json can't be read"):
        train(new_model(), rows, SETTINGS, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = new_model()

    def poison(step, loss):
        if step == 3:
            model.norm.weight.data[0] = torch.nan

    with pytest.raises(
        BMojoError, match=r"the loss is nan at step 4, the last finite one was \d\.\d+; use a lower learn"
    ):
        train(model, rows, SETTINGS, tmp_path, on_step=poison, tensorboard=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("enforce fail\nat")])
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_finished(whole, tmp_path, monkeypatch, error):
    save = np.save

    def failing(path, array):
        if len(array) == 10:
            raise error
        save(path, array)

    monkeypatch.setattr(checkpoints_module.np, "save", failing)
    with pytest.raises(
        BMojoError, match=r"can't write the checkpoint of step 10 to .*; what was finished before"
    ) as got:
        train(new_model(), rows, SETTINGS, tmp_path, tensorboard=False)
    assert "\n" not in str(got.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-5"]
    monkeypatch.undo()
    model = new_model()
    train(model, rows, SETTINGS, tmp_path, tensorboard=False)
    assert same_weights(model, whole[1])


def test_rows_of_another_length_are_refused(tmp_path):
    settings = TrainSettings(steps=2, batch_size=1, seq_len=16)
    with pytest.raises(BMojoError, match="rows must have seq_len=16 tokens, got 24"):
        train(new_model(), rows, settings, tmp_path, tensorboard=False)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "bmojo.train.hf", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"transformers: pip install 'bmojo\[train\]'"):
        train(new_model(), rows, SETTINGS, tmp_path)


def test_peak_memory_rises_with_use():
    reset_peak_memory()
    before = peak_memory_bytes()
    block = torch.ones(16 * 2**20)
    assert peak_memory_bytes() - before > 32 * 2**20
    del block
