"""transformers.Trainer under torchrun: two processes give one's losses; sharded checkpoints go on, and are exported."""

import json
from pathlib import Path

import pytest
import torch
import trainer_script
from transformers import AutoModelForCausalLM

from bmojo import BMojoConfig, BMojoLM, presets
from bmojo.train.export import SHARDS, export

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
SCRIPT = Path(trainer_script.__file__)
UNTIED = {"tie_embeddings": False}
HEAD = {"innovation": "head"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def launch(torchrun, folder):
    def run(processes, runs):
        plan, results = folder / f"plan-{processes}.json", folder / f"results-{processes}.json"
        plan.write_text(json.dumps({name: {"folder": str(folder / name), **more} for name, more in runs.items()}))
        done = torchrun(processes, SCRIPT, plan, results)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(results.read_text())

    return run


@pytest.fixture(scope="module")
def one(folder):
    """Losses of a single process, without torchrun."""
    runs = {"tied": {}, "untied": UNTIED, "head": HEAD}
    return {name: trainer_script.run(folder / f"one-{name}", **more) for name, more in runs.items()}


@pytest.fixture(scope="module")
def two(launch, folder):
    return launch(
        2,
        {
            "ddp": {},
            "ddp-checkpointing": {"checkpointing": True, **UNTIED},
            "ddp-accumulate": {"accumulate": 2},
            "ddp-head": HEAD,
            "fsdp": {"fsdp": True},
            "fsdp-checkpointing": {"fsdp": True, "checkpointing": True, **UNTIED},
            "fsdp-head": {"fsdp": True, **HEAD},
            "resumed-by-two": {"fsdp": True, "resume": str(folder / "fsdp" / "checkpoint-2")},
        },
    )


def close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys() == {"1", "2", "3", "4"}
    assert got == pytest.approx(expected, abs=tolerance, rel=0)


@pytest.mark.parametrize("name", ["ddp", "ddp-accumulate", "fsdp"])
def test_two_processes_give_the_losses_of_one(one, two, name):
    close(two[name], one["tied"])


@pytest.mark.parametrize("name", ["ddp-checkpointing", "fsdp-checkpointing"])
def test_also_with_gradient_checkpointing_and_untied_embeddings(one, two, name):
    close(two[name], one["untied"])


def test_no_auxiliary_loss_is_lost_in_shards(one, two):
    close(two["fsdp-head"], two["ddp-head"])
    close(two["fsdp-head"], one["head"])


def test_a_sharded_checkpoint_goes_on_with_one_process_and_with_two(one, two, launch, folder):
    close(two["resumed-by-two"], one["tied"])
    alone = launch(1, {"resumed-by-one": {"fsdp": True, "resume": str(folder / "fsdp" / "checkpoint-2")}})
    close(alone["resumed-by-one"], one["tied"])


def test_a_sharded_checkpoint_is_exported(two, folder):
    checkpoint, target = folder / "fsdp" / "checkpoint-4", folder / "exported"
    assert {path.suffix for path in (checkpoint / SHARDS).iterdir()} == {"", ".distcp"}
    assert len(list((checkpoint / SHARDS).glob("*.distcp"))) == 2
    BMojoConfig.from_core(presets.bmojo("tiny", **trainer_script.SMALL)).save_pretrained(folder / "fsdp")
    export(checkpoint, target)
    whole = BMojoLM.load(folder / "one-tied" / "checkpoint-4").state_dict()
    for name, tensor in BMojoLM.load(target).state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4, msg=name)
        if name.endswith("projection"):  # a buffer: the same in all, and in no shard
            assert torch.equal(tensor, whole[name])
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(target)(tokens).logits, BMojoLM.load(target)(tokens)[0]
    )
