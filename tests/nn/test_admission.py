"""Learned admission: the odds multiply the innovation, and learn from what the slots were used for."""

import pytest
import torch
import torch.nn.functional as F
from cases import draw_tokens, make_model, shaken, simplest

from bmojo.memory import read as read_module
from bmojo.nn.admission import Admission, usage_loss
from bmojo.nn.mixer import Mixer, Trace
from bmojo.ops.attention import largest_weights
from bmojo.ops.dispatch import use_backend
from bmojo.train.loss import next_token_loss


def learned(**changes):
    return simplest("rls", admission="learned", **changes)


def test_at_the_start_it_is_the_innovation_alone():
    plain, own = Mixer(simplest("rls")), Mixer(learned())
    own.load_state_dict(plain.state_dict(), strict=False)
    x, traces = torch.randn(2, 19, 8), (Trace(), Trace())
    (o, state), (o2, state2) = plain(x, trace=traces[0]), own(x, trace=traces[1])
    assert torch.equal(o, o2)
    assert all(torch.equal(state[name], state2[name]) for name in state)
    assert torch.equal(traces[0].innovation[0], traces[1].innovation[0])


@pytest.mark.parametrize("conv_size", [0, 3])
def test_the_score_is_the_innovation_times_the_odds(conv_size):
    mixer = shaken(Mixer(learned(conv_size=conv_size)))
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    trace, plain = Trace(), Trace()
    mixer(x, trace=trace)
    w, b = mixer.admission.weight, mixer.admission.bias
    assert w.shape == (2 if conv_size else 1, 8)
    admission, mixer.admission = mixer.admission, None
    mixer(x, trace=plain)
    shifted = x if mixer.conv is None else mixer.conv(F.pad(x, (0, 0, mixer.conv.lags, 0)))
    odds = (x @ w[0] + (shifted @ w[1] if conv_size else 0) + b).exp()
    torch.testing.assert_close(trace.innovation[0], plain.innovation[0] * odds)
    assert admission(x * 1e9, shifted).abs().max() <= 20


def test_it_learns_from_its_own_loss_alone():
    mixer = shaken(Mixer(learned()))
    x = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    trace = Trace()
    out, _ = mixer(x, trace=trace)
    trace.losses[0].sum().backward(retain_graph=True)
    assert {n for n, p in mixer.named_parameters() if p.grad is not None} == {"admission.weight", "admission.bias"}
    assert mixer.admission.weight.grad.any()
    assert x.grad is None
    mixer.zero_grad(set_to_none=True)
    out.sum().backward()
    assert mixer.admission.weight.grad is None


def test_usage_loss_takes_the_largest_use_of_each_token_that_was_visible():
    g = torch.tensor([[0.3, -1.0, 2.0, 0.7]])
    index = torch.tensor([[[0, 2], [2, 1]]])
    used = torch.tensor([[[0.1, 0.9], [0.4, 0.5]]])
    visible = torch.tensor([[[True, True], [True, False]]])  # token 1 was never visible, token 3 in no slot
    expected = F.binary_cross_entropy_with_logits(g[0, [0, 2]], torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(usage_loss(g, index, used, visible), expected[None])
    rows = [torch.cat(z) for z in ((g, g), (index, index + 4), (used, used))]  # a second one, where nothing was visible
    torch.testing.assert_close(
        usage_loss(*rows, torch.cat((visible, visible & False))), torch.stack((expected, 0 * expected))
    )


@pytest.mark.parametrize("cut", [17, 18, 19, 20])
def test_tokens_of_earlier_calls_teach_nothing(cut):
    mixer = shaken(Mixer(learned(eidetic_slots=24)))
    x = torch.randn(1, 21, 8, dtype=torch.float64)
    _, state = mixer(x[:, :cut])
    trace = Trace()
    mixer(x[:, cut:], state, trace=trace)
    assert trace.losses[0] == 0  # the last query sees the slots up to token 16, which came before all of this call


def test_padding_looks_at_no_slot(monkeypatch):
    """Nor do the places that a chunk has left behind its last token."""
    config = learned(eidetic_slots=12)
    seen = []

    def spy(q, k, mask, count):
        seen.append(mask[..., -count:])
        return largest_weights(q, k, mask, count)

    monkeypatch.setattr(read_module, "largest_weights", spy)
    with use_backend("chunked"):
        shaken(Mixer(config))(torch.randn(1, 13, 8, dtype=torch.float64), trace=Trace())
    (slots,) = seen
    assert slots[-1, 0, 0].any()  # token 12 does
    assert not slots[-1, 0, 1:].any()


def test_the_loss_has_its_weight():
    losses = []
    for weight in (0.5, 1.0):
        mixer, trace = shaken(Mixer(learned(admission_loss_weight=weight))), Trace()
        mixer(torch.ones(1, 13, 8, dtype=torch.float64).cumsum(1).sin(), trace=trace)
        losses.append(trace.losses[0])
    assert losses[1] > 0
    assert losses[0] == losses[1] / 2


def test_training_reaches_it_and_inference_pays_nothing():
    model = make_model(learned(num_layers=2)).train()
    tokens = draw_tokens(2, 17)
    next_token_loss(model, {"tokens": tokens, "labels": tokens}).backward()
    assert all(block.mixer.admission.weight.grad.any() for block in model.blocks)
    trace = Trace()
    with torch.no_grad():
        model(tokens, trace=trace)
    assert trace.losses == []


def test_its_bias_does_not_decay():
    assert Admission.no_decay == ("bias",)
