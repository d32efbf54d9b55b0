"""A training step and a decode step never ask the device for a number: on tensors without values nothing is missed."""

from __future__ import annotations

import pytest
import torch
from cases import small_preset
from torch._subclasses.fake_tensor import FakeTensorMode

from bmojo.memory.step import Step
from bmojo.nn.loss import auxiliary_loss, cross_entropy
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM
from bmojo.presets import PRESETS

CASES = [(name, {}) for name in PRESETS]
CASES += [("bmojo", {"innovation": kind}) for kind in ("ema", "state", "head", "random")]
CASES += [("bmojo", {"ssm": "gdn", "positions": "compact", "fading": "summary", "tie_sources": False})]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_training_does_not_wait_for_the_device(name, changes):
    with FakeTensorMode():
        model, tokens, trace = BMojoLM(small_preset(name, **changes)), torch.zeros(2, 21, dtype=torch.int64), Trace()
        logits, _ = model(tokens, trace=trace)
        (cross_entropy(logits.flatten(0, 1), tokens.flatten()) + auxiliary_loss(trace)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("name", "changes"), [case for case in CASES if case[0] != "transformer"])  # its cache grows
@torch.no_grad()
def test_decoding_does_not_wait_for_the_device(name, changes, monkeypatch):
    monkeypatch.setattr(Step, "any_ends_chunk", True)
    with FakeTensorMode():
        model, token = BMojoLM(small_preset(name, **changes)), torch.zeros(2, 1, dtype=torch.int64)
        _, state = model(token, model.empty_state(2), donate=True)
        model(token, state, donate=True)


def test_a_device_is_not_asked_whether_a_chunk_ends():
    position = torch.zeros(2, dtype=torch.int64, device="meta")
    assert Step(position, position, 4).any_ends_chunk is True
