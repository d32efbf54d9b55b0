import json

import pytest

SMALL = ["--set", "hidden_size=32", "--set", "num_layers=1"]


def test_writes_the_program_and_names_its_operators(bmojo, tmp_path):
    code, out, err = bmojo("lower", "--preset", "mamba2", *SMALL, "--out", str(tmp_path / "step.mlir"), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["undocumented"] == []
    assert json.loads(out)["operators"]["dot_general f32"] > 0
    assert "func.func public @main" in (tmp_path / "step.mlir").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("step", ["train", "prefill"])
def test_other_steps_and_protos(bmojo, tmp_path, step):
    code, out, _ = bmojo(
        "lower", "--preset", "swa", *SMALL, "--what", step, "--time", "64", "--out", str(tmp_path / "x.pb")
    )
    assert code == 0
    assert "documentation of Neuron SDK" in out
    assert (tmp_path / "x.pb").stat().st_size > 1000


def test_refuses(refused):
    assert "unknown step 'trian'; did you mean 'train'?" in refused("lower", "--what", "trian")
    assert "must end in .mlir" in refused("lower", "--out", "x.txt")
    assert "needs a context" in refused("lower", "--model", "transformer")
