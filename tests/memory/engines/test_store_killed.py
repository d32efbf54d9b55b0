"""A store whose writer is killed at any moment has all that was acknowledged, and nothing half-written."""

import subprocess
import sys
from pathlib import Path

import pytest

LOCAL = ["lmdb", "sqlite"]


def kill(folder, engine, kills):
    script = Path(__file__).with_name("kill_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), engine, "0", str(kills)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("engine", LOCAL)
def test_a_killed_writer_loses_nothing(tmp_path, engine):
    kill(tmp_path / "store", engine, 5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", LOCAL)
def test_200_killed_writers_lose_nothing(tmp_path, engine):
    told = kill(tmp_path / "store", engine, 200)
    for step in ("put", "delete", "compact", "open"):  # and in "note", where that takes long enough to be hit
        assert step in told
