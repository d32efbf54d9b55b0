"""What a training step keeps for its gradients grows with the length, not with its square, nor with the vocabulary."""

import pytest
import torch

from bmojo import BMojoLM, presets
from bmojo.train import next_token_loss

SMALL = {"hidden_size": 32, "num_heads": 2, "window": 32, "chunk_size": 32, "ssm_head_dim": 16, "intermediate_size": 32}


def kept_bytes(model, time):
    """Bytes of the tensors that autograd keeps of a training step, weights left out, and each storage counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    tokens = torch.randint(model.config.vocab_size, (1, time + 1), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(model, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_is_linear_in_the_length(name, checkpointing):
    model = BMojoLM(presets.PRESETS[name]("tiny", **SMALL))
    model.gradient_checkpointing = checkpointing
    short, long = (kept_bytes(model, time) for time in (512, 1024))
    assert 1.9 < long / short < 2.05


def test_checkpointing_keeps_the_inputs_of_blocks_and_no_logits():
    vocab, hidden = 40_000, SMALL["hidden_size"]
    model = BMojoLM(presets.bmojo("tiny", **SMALL, vocab_size=vocab))
    model.gradient_checkpointing = True
    short, long = (kept_bytes(model, time) for time in (512, 1024))
    inputs = (len(model.blocks) + 4) * 4 * hidden  # of the last norm three more, and the gradient of the features
    assert (long - short) / 512 < inputs + 64
    assert short < 512 * inputs + 4 * hidden * vocab + 2**16  # beside them, the gradient of the head
