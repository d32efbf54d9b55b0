"""A process that streams with a store may be killed at any moment."""

import subprocess
import sys
from pathlib import Path

import pytest


def kill(folder: Path, kills: int) -> None:
    script = Path(__file__).with_name("stream_kill_script.py")
    done = subprocess.run([sys.executable, str(script), str(folder), str(kills)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_killed_stream_goes_on(tmp_path):
    kill(tmp_path, 4)


@pytest.mark.slow
def test_a_stream_killed_30_times_goes_on(tmp_path):
    kill(tmp_path, 30)
