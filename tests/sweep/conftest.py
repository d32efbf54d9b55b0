import os
import signal
import subprocess
import sys

import pytest

from bmojo.sweep.grid import Sweep

MODEL = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "intermediate_size": 64, "ssm_head_dim": 16, "window": 16,
         "chunk_size": 16, "eidetic_slots": 8}  # fmt: skip
TRAINING = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "log_every": 2}
TASK = {"length": 48, "pairs": 4, "keys": 8, "values": 8}


@pytest.fixture(scope="session")
def make_sweep():
    """A small sweep over MQAR: further axes, and changes of what every point has or of the sweep."""

    def make(*axes, fixed=None, without=(), **changes):
        settings = {**MODEL, **TRAINING, **TASK, **(fixed or {})}
        varied = {name for axis in axes for name in (axis[0] if axis else ())} | set(without)
        every = tuple(({name: value},) for name, value in settings.items() if name not in varied)
        return Sweep(**{"task": "mqar", "models": ("swa", "bmojo"), "eval_rows": 8, **changes, "axes": every + axes})

    return make


def axis(name, *values):
    return tuple({name: value} for value in values)


@pytest.fixture(scope="session", name="axis")
def axis_fixture():
    """An axis of one setting."""
    return axis


@pytest.fixture
def start_sweep():
    """Start `bmojo sweep` over two numbers of pairs, in a process group of its own, which is killed in the end."""
    started = []

    def start(folder, *arguments, torchrun=0):
        settings = {**MODEL, **TRAINING, **TASK, "steps": 200, "checkpoint_every": 20, "pairs": "2,4"}
        command = [sys.executable, "-m"]
        if torchrun:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun), "-m"]
        command += ["bmojo", "sweep", "mqar", "--models", "swa,bmojo", "--eval-rows", "8", "--out", str(folder)]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        running = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(running)
        return running

    yield start
    for running in started:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
