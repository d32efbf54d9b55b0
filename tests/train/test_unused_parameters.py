import torch
from cases import VOCAB, any_config
from hypothesis import given

from bmojo import BMojoLM
from bmojo.train import next_token_loss
from bmojo.train.hf import _has_unused


@given(any_config())
def test_parameters_without_a_gradient_are_foreseen(config):
    """DDP must be told of them, and looks for them at a cost."""
    model = BMojoLM(config)
    tokens = torch.randint(VOCAB, (2, 11))
    next_token_loss(model, {"tokens": tokens, "labels": tokens}).backward()
    assert _has_unused(model) == any(parameter.grad is None for parameter in model.parameters())
