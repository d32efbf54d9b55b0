import json

import pytest
import torch
from torch.distributed import checkpoint as dcp

from bmojo import BMojoLM, presets
from bmojo.cli import main
from bmojo.errors import CheckpointError
from bmojo.train import export as export_module
from bmojo.train.export import SHARDS, export

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window": 8, "chunk_size": 4,
         "ssm_head_dim": 8, "eidetic_slots": 4, "innovation_dim": 4}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BMojoLM(presets.bmojo("tiny", **SMALL))


def write_shards(checkpoint, model, prefix="model."):
    """As Trainer with FSDP does, of one process."""
    state = {"model": {prefix + name: tensor for name, tensor in model.state_dict().items()}}
    dcp.save(state, checkpoint_id=checkpoint / SHARDS, no_dist=True)


@pytest.fixture
def checkpoint(model, tmp_path):
    """A sharded checkpoint with its configuration beside it."""
    folder = tmp_path / "run" / "checkpoint-3"
    write_shards(folder, model)
    (folder / "config.json").write_text(json.dumps(model.config.to_checkpoint()))
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # says dcp.save


@pytest.fixture
def target(tmp_path):
    """Where to export to; in the end there is a whole model or nothing."""
    folder = tmp_path / "deep" / "model"
    yield folder
    assert not folder.exists() or {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_gives_the_model_back_to_the_bit(model, checkpoint, target, capsys):
    exported = export(checkpoint, target)
    for other in (exported, BMojoLM.load(target)):
        assert other.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    again = target.parent / "again"
    assert main(["export", str(checkpoint / SHARDS), str(again)]) == 0
    out, err = capsys.readouterr()
    assert (out.partition(": ")[0], err) == (str(again), "")
    for path in target.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_whatever_module_held_the_model(model, tmp_path, target, prefix):
    write_shards(tmp_path, model, prefix)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_checkpoint()))
    export(tmp_path, target)
    assert torch.equal(BMojoLM.load(target).embed.weight, model.embed.weight)


def test_takes_the_configuration_that_is_named_or_lies_near(model, checkpoint, target, tmp_path):
    (checkpoint / "config.json").rename(checkpoint.parent / "config.json")
    assert export(checkpoint, target).config == model.config
    (checkpoint.parent / "config.json").rename(tmp_path / "mine.json")
    with pytest.raises(CheckpointError, match=r"no config\.json beside .*; name that of the model with --config"):
        export(checkpoint, tmp_path / "other")
    assert export(checkpoint, tmp_path / "other", config=tmp_path / "mine.json").config == model.config
    with pytest.raises(CheckpointError, match=r"no configuration at .*nowhere.config\.json"):
        export(checkpoint, tmp_path / "third", config=tmp_path / "nowhere")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"mine\.json is not a bmojo configuration"):
        export(checkpoint, tmp_path / "third", config=tmp_path / "mine.json")
    assert not (tmp_path / "third").exists()


def test_what_is_no_sharded_checkpoint_is_refused(model, checkpoint, tmp_path, target):
    with pytest.raises(CheckpointError, match=r"no sharded checkpoint at .*: expected pytorch_model_fsdp_0/\.metadata"):
        export(tmp_path, target)
    model.save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"is not sharded: its model\.safetensors can be used as it is"):
        export(tmp_path / "plain", target)
    with pytest.raises(CheckpointError, match=r"is there already; choose a new folder"):
        export(checkpoint, tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_embeddings": False}, r"head\.weight is missing, expected \(32, 16\)"),
        ({"num_layers": 1}, r"blocks\.1\.\S+ is \(.*\), expected no such tensor"),
        ({"vocab_size": 33}, r"embed\.weight is \(32, 16\), expected \(33, 16\)|expected \(33, 16\)"),
    ],
)
def test_weights_of_another_configuration_are_named(checkpoint, target, changes, message):
    other = presets.bmojo("tiny", **{**SMALL, **changes})
    (checkpoint / "config.json").write_text(json.dumps(other.to_checkpoint()))
    with pytest.raises(CheckpointError, match=f"do not belong to the configuration: {message}"):
        export(checkpoint, target)


def test_damage_is_named(checkpoint, target):
    (piece,) = (checkpoint / SHARDS).glob("*.distcp")
    content = piece.read_bytes()
    piece.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"is damaged \(.+\); export another checkpoint"):
        export(checkpoint, target)
    piece.unlink()
    with pytest.raises(CheckpointError, match=rf"is not whole: {piece.name} is missing"):
        export(checkpoint, target)
    for content in (b"", b"not a pickle", (checkpoint / SHARDS / ".metadata").read_bytes()[:100]):
        (checkpoint / SHARDS / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
            export(checkpoint, target)


def test_nothing_is_left_if_it_cannot_be_written(checkpoint, target, monkeypatch):
    def fail(self, folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.BMojoLM, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, target)
    assert not target.exists()
