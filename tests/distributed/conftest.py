import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def torchrun():
    """Start `torchrun` on a free port: (processes, arguments...) -> the finished process, or the running one."""

    def start(processes, *arguments, wait=True):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        running = subprocess.Popen(
            [*command, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait:
            return running
        out, err = running.communicate(timeout=240)
        return subprocess.CompletedProcess(command, running.returncode, out, err)

    return start
