"""A model's cross entropy without its logits, whatever its head is."""

import pytest
import torch
from cases import VOCAB, draw_tokens, make_model, small_preset

from bmojo.nn.loss import cross_entropy
from bmojo.ops import cross_entropy as op


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(op, "LOGIT_BYTES", 4 * VOCAB * 8)


class Scaled(torch.nn.Linear):
    """A head of another make."""

    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("n", [0, 5, 29])
@pytest.mark.parametrize("head", ["tied", "untied", "another"])
def test_equals_that_of_all_logits(head, n):
    model = make_model(small_preset("swa", tie_embeddings=head == "tied"))
    if head == "another":
        model.head = Scaled(model.config.hidden_size, VOCAB).double()
    features = torch.randn(n, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    features.requires_grad_()
    labels = draw_tokens(1, max(1, n))[0][:n]
    labels[1:3] = -100
    weights = list((model.embed if model.head is None else model.head).parameters())
    found = []
    for loss in (model.cross_entropy(features, labels) / 7, cross_entropy(model.logits(features), labels, 7)):
        found.append((loss.detach(), *torch.autograd.grad(loss, [features, *weights])))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_head_is_called_once():
    """A module that is sharded has its weight whole only while it is called."""
    for tied in (True, False):
        model = make_model(small_preset("swa", tie_embeddings=tied))
        calls = []
        (model.embed if tied else model.head).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.cross_entropy(torch.zeros(29, model.config.hidden_size).double(), draw_tokens(1, 29)[0])
        assert len(calls) == 1
