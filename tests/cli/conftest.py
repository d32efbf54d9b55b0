from pathlib import Path

import pytest
import torch

from bmojo.cli import main

SMALL = ["--set", "hidden_size=32", "--set", "num_heads=2", "--set", "num_layers=1", "--set", "ssm_head_dim=16"]
RUN = ["--steps", "3", "--batch-size", "2", "--seq-len", "32", "--held-out", "0.3", "--threads", "1", *SMALL]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"Document {i} tells of the number {i} ünd of nothing else.\n" * 4)
    return folder


@pytest.fixture(scope="session")
def run_options() -> list[str]:
    """Options of a small run."""
    return RUN


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, corpus) -> Path:
    """A finished `bmojo train`."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--out", str(out), "--text", str(corpus), *RUN]) == 0
    return out


@pytest.fixture
def bmojo(capsys):
    """Run a command line: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(bmojo):
    """Run a command line that the user must mend: its one line, after checking that it is one, and exit code 2."""

    def run(*arguments):
        code, out, err = bmojo(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("bmojo: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return run
