import os

import pytest
import torch

from bmojo.errors import BMojoError
from bmojo.sweep import workers
from bmojo.sweep.workers import TOLD, Place, launch, leave_group, started_by_torchrun
from bmojo.train.processes import processes


@pytest.fixture
def told(monkeypatch):
    """What torchrun would tell the sixth of eight workers on two machines."""
    values = dict.fromkeys(TOLD, "0") | {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "TORCHELASTIC_RUN_ID": "run",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    yield values
    torch.set_num_threads(threads)


def test_a_worker_is_a_run_of_its_own(told, monkeypatch):
    assert started_by_torchrun()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert leave_group(threads=1) == Place(rank=5, local_rank=1, local_workers=4)
    assert not started_by_torchrun()
    assert not told.keys() & os.environ.keys()
    assert processes().num_processes == 1


@pytest.mark.parametrize(("visible", "gpus", "own"), [("4,6", 2, "6"), ("4", 1, "4"), ("", 4, "1"), ("", 0, "")])
def test_each_worker_has_the_gpu_of_its_local_rank(told, monkeypatch, visible, gpus, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    leave_group()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_workers_share_the_cores(told, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    workers.share_cores(4, None)
    workers.share_cores(32, None)
    workers.share_cores(4, 3)
    assert asked == [4, 1, 3]


def fail(message):
    return message


def die(*_):
    os._exit(7)


@pytest.mark.slow
def test_what_a_worker_reports_is_raised():
    with pytest.raises(BMojoError, match="the disk is full"):
        launch(2, fail, "the disk is full")


@pytest.mark.slow
def test_a_worker_that_dies_is_told():
    with pytest.raises(BMojoError, match=r"a worker ended early .*run the same command again to go on"):
        launch(2, die)
