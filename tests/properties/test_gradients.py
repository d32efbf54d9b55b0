"""Gradients: through the chosen tokens and through nothing else; the same in both backends and through the state."""

from __future__ import annotations

import torch
from cases import any_config, close, draw_tokens, make_model, partitions, run_calls, shaken
from hypothesis import given
from hypothesis import strategies as st

from bmojo.config import ModelConfig
from bmojo.nn.mixer import Mixer, Trace
from bmojo.ops.dispatch import use_backend


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(got, expected):
    for name, gradient in expected.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None:
            close(got[name], gradient, message=name)


@given(data=st.data())
def test_both_backends_and_any_partition_give_the_same_gradients(data):
    model = make_model(data.draw(any_config()))
    time = data.draw(st.integers(1, 17))
    tokens = draw_tokens(2, time)

    def loss(lengths: list[int]) -> torch.Tensor:
        return run_calls(model, tokens, lengths)[0].square().sum()

    expected = gradients(model, loss([time]))
    assert any(g is not None and bool(g.any()) for g in expected.values())
    with use_backend("naive"):
        same_gradients(gradients(model, loss([time])), expected)
    same_gradients(gradients(model, loss(data.draw(partitions(time)))), expected)
    same_gradients(gradients(model, loss([1] * time)), expected)


def test_the_gradient_of_a_query_reaches_the_kept_tokens_and_no_other_old_one():
    config = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, window=4, chunk_size=4, eidetic_slots=3,
                         ssm_head_dim=4, innovation="ema")  # fmt: skip
    mixer = shaken(Mixer(config))
    x = torch.randn(1, 24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    trace = Trace()
    _, state = mixer(x[:, :20], trace=trace)
    kept = set(trace.kept[0][0].tolist())
    for query in (20, 23):
        (gradient,) = torch.autograd.grad(mixer(x)[0][0, query].sum(), x)
        reached = set(torch.nonzero(gradient[0].abs().sum(-1))[:, 0].tolist())
        old = {p for p in kept if p <= query - 4}
        assert len(old) >= 2
        assert reached == old | set(range(query - 3, query + 1))
    assert not any(state[name].requires_grad for name in ("slot_score", "slot_position", "pending", "ema"))


@given(data=st.data())
def test_the_gradient_of_a_logit_stops_at_its_own_token(data):
    model = make_model(data.draw(any_config()))
    time = data.draw(st.integers(1, 17))
    t = data.draw(st.integers(0, time - 1))
    x = torch.randn(1, time, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mixer = model.blocks[-1].mixer
    (gradient,) = torch.autograd.grad(mixer(x)[0][0, t].sum(), x)
    assert not gradient[0, t + 1 :].any()
    assert gradient[0, t].any()


def test_the_head_learns_from_its_own_loss_alone():
    config = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, window=4, chunk_size=4, eidetic_slots=3,
                         ssm_head_dim=4, innovation="head")  # fmt: skip
    mixer = shaken(Mixer(config))
    x = torch.randn(2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    trace = Trace()
    out, _ = mixer(x, trace=trace)
    trace.losses[0].sum().backward(retain_graph=True)
    assert [n for n, p in mixer.named_parameters() if p.grad is not None] == ["innovation.predict.weight"]
    assert x.grad is None
    mixer.zero_grad(set_to_none=True)
    out.sum().backward()
    assert mixer.innovation.predict.weight.grad is None
