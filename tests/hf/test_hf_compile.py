"""torch.compile of the Transformers model: the same loss and gradients, without graph breaks in training."""

import pytest
import torch
from cases import close, draw_tokens
from hf_cases import hf_model

from bmojo.ops import cross_entropy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model, call, **inputs):
    model.zero_grad()
    out = call(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [64, 8])
@pytest.mark.parametrize(("name", "changes"), [("hybrid", {}), ("bmojo", {}), ("bmojo", {"innovation": "head"})])
def test_training_compiled_equals_eager(name, changes, rows, monkeypatch):
    """With the logits of the batch at once, and a few rows of them at a time."""
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * 13 * rows)
    model = hf_model(name, **changes).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        tokens = draw_tokens(2, 21, seed=seed)
        expected, gradients = run(model, model, input_ids=tokens, labels=tokens)
        found, again = run(model, compiled, input_ids=tokens, labels=tokens)
        close(found.loss, expected.loss, 1e-9)
        assert found.logits is expected.logits is None
        assert again.keys() == gradients.keys()
        for key, gradient in gradients.items():
            close(again[key], gradient, 1e-8, key)
