"""A system as a layer, and back: exact in every form of the layer, or within the bound, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from systems import stable, systems

from bmojo.errors import RealizationError
from bmojo.memory.step import Step
from bmojo.ops.dispatch import use_backend
from bmojo.realize import LTI, cva
from bmojo.realize.layer import layer_input, left_out


def answers(system, layer, T=45, seed=0):
    """y of the system and of the layer, over the largest y."""
    m, p = system.sizes[1:]
    u = np.random.default_rng(seed).standard_normal((2, T, m))
    y = system.respond(u)
    with torch.no_grad():
        o, _ = layer(layer_input(layer, torch.from_numpy(u)))
    return y / np.abs(y).max(), o[:, 1:, :p].numpy() / np.abs(y).max()


@given(systems(positive=True), st.sampled_from([None, 12]))
@settings(max_examples=12)
def test_positive_poles_are_a_fading_state_exactly(system, hidden):
    layer = system.to_layer(hidden_size=hidden)
    assert layer.kind == "ssm"
    y, o = answers(system, layer)
    assert_allclose(o, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inputs", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 6])
def test_any_numbers_of_inputs_and_outputs(inputs, window):
    system = stable(4, 3, 2, inputs, positive=True)
    y, o = answers(system, system.to_layer(window=window), T=700)
    assert_allclose(o, y, rtol=0, atol=1e-10)


@given(systems(positive=True), st.integers(1, 9))
@settings(max_examples=12)
def test_a_window_and_what_faded_before_it_exactly(system, window):
    layer = system.to_layer(window=window)
    assert layer.kind == "bmojo"
    assert layer.config.window == window
    y, o = answers(system, layer)
    assert_allclose(o, y, rtol=0, atol=1e-10)


@given(systems(), st.integers(1, 8))
@settings(max_examples=12)
def test_any_other_poles_within_the_bound(system, window):
    layer = system.to_layer(window=window, tolerance=np.inf)
    m, p = system.sizes[1:]
    u = np.random.default_rng(1).uniform(-1, 1, (1, 60, m))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)  # sup |u| = 1
    with torch.no_grad():
        o, _ = layer(layer_input(layer, torch.from_numpy(u)))
    error = np.linalg.norm(o[0, 1:, :p].numpy() - system.respond(u)[0], axis=-1).max()
    modal = system.to_modal()
    other = ~((np.diag(modal.A) > 0) & ~(modal.A - np.diag(np.diag(modal.A))).any(0))
    if not other.any():
        assert error < 1e-9
        return
    h = LTI(modal.A[np.ix_(other, other)], modal.B[other], modal.C[:, other], modal.D).impulse(3000)[window:]
    assert error <= np.linalg.norm(h, 2, (1, 2)).sum() * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(
    ("system", "options", "kind"),
    [
        (stable(0, 3, 2, 3, positive=True), {}, "ssm"),
        (stable(0, 3, 2, 3, positive=True), {"window": 4}, "bmojo"),
        (stable(1, 4, 2, 3, pairs=1, radius=0.5), {}, "bmojo"),
        (stable(1, 2, 1, 2, pairs=1, radius=0.5), {}, "attention"),
        (stable(2, 3, 1, 2).shift(5), {}, "attention"),
    ],
)
def test_every_form_of_the_layer_gives_it(system, options, kind):
    """In one call, in two, a token at a time, by definition and in chunks."""
    layer = system.to_layer(**options)
    assert layer.kind == kind
    m, p = system.sizes[1:]
    u = np.random.default_rng(0).standard_normal((1, 30, m))
    y, x = system.respond(u), layer_input(layer, torch.from_numpy(u))
    scale = np.abs(y).max()
    with torch.no_grad():
        for backend in ("naive", "chunked", "fused"):
            with use_backend(backend):
                whole, _ = layer(x)
                first, state = layer(x[:, :11])
                second, _ = layer(x[:, 11:], state)
                steps, state = [], layer.empty_state(1, dtype=torch.float64)
                for t in range(x.shape[1]):
                    o, state = layer.step(
                        x[:, t], state, Step(state["position"], state["document"], layer.config.chunk_size)
                    )
                    steps.append(o)
            for o in (whole, torch.cat((first, second), 1), torch.stack(steps, 1)):
                assert_allclose(o[0, 1:, :p].numpy() / scale, y[0] / scale, rtol=0, atol=1e-9, err_msg=backend)


def test_a_shift_depends_on_the_window_alone():
    """The window form of a system sees what a layer with that window sees: the last `window` inputs, and this one."""
    system = stable(3, 3, 1, 2).shift(4)
    layer = system.to_layer()
    assert (layer.kind, layer.config.window) == ("attention", 5)
    u = torch.randn(1, 20, 2, dtype=torch.float64, requires_grad=True)
    o, _ = layer(layer_input(layer, u))
    (gradient,) = torch.autograd.grad(o[0, 1 + 12, 0], u)
    assert [t for t in range(20) if gradient[0, t].abs().max() > 1e-12] == [8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("system", "options"),
    [
        (stable(0, 3, 2, 3, positive=True), {}),
        (stable(0, 3, 2, 3, positive=True), {"window": 3}),
        (stable(2, 3, 1, 2).shift(5), {}),
    ],
)
def test_linearized_it_is_the_system_again(system, options):
    layer = system.to_layer(**options)
    m, p = system.sizes[1:]
    x = layer_input(layer, torch.zeros(1, 20, m, dtype=torch.float64))
    with torch.no_grad():
        _, state = layer(x)
    back = LTI(*layer.linearize(state, x[0, 1]))
    h = system.impulse(12)
    assert_allclose(back.impulse(12)[:, :p, :m], h, rtol=0, atol=1e-10 * np.abs(h).max())


def test_an_identified_model_is_a_layer_that_predicts_and_trains():
    truth = stable(7, 3, 2, 5, radius=0.6)
    y = truth.simulate(4000, 0)
    model = cva(y - y.mean(0), 3)
    layer = model.predictor().to_layer(tolerance=1e-6)
    data = y[:300] - y.mean(0)
    expected = model.kalman(data, steady=True).predictions
    assert_allclose(model.predictor().respond(data), expected, atol=1e-10)
    x = layer_input(layer, torch.from_numpy(data)[None])
    o, _ = layer(x)
    bound = 1e-6 * np.linalg.norm(data, axis=1).max()
    assert np.abs(o[0, 1:, :2].detach().numpy() - expected).max() <= bound

    layer, target = layer.float(), torch.from_numpy(data)[None].float()
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-4)

    def loss():
        return (layer(x.float())[0][:, 1:, :2] - target).square().mean()

    before = loss()
    before.backward()
    assert all(torch.isfinite(z.grad).all() for z in layer.parameters())
    optimiser.step()
    assert loss() < before


def test_every_number_of_a_fading_layer_that_matters_has_a_gradient():
    layer = stable(0, 3, 2, 3, positive=True).to_layer()
    x = layer_input(layer, torch.randn(1, 20, 3, dtype=torch.float64))
    layer(x)[0].square().sum().backward()
    for name in ("A_log", "dt_bias"):
        assert (getattr(layer.ssm, name).grad.flatten()[:6] != 0).all(), name
    assert (layer.ssm.out_proj.weight.grad[:2, :6] != 0).all()


GOOD = stable(0, 2, 1, 2, positive=True)
RINGING = stable(1, 2, 1, 2, pairs=1, radius=0.9)


def test_what_a_window_leaves_out():
    h = RINGING.impulse(2000)
    tails = left_out(RINGING, 10)
    assert_allclose(tails, [np.abs(np.linalg.norm(h[w:], 2, (1, 2))).sum() for w in range(11)], rtol=1e-9)
    least = np.flatnonzero(left_out(RINGING, 500) <= 1e-9)[0]
    assert RINGING.to_layer().config.window == least


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda: LTI(np.eye(1), np.eye(1), np.eye(1), np.eye(1)).to_layer(), "unstable"),
        (lambda: RINGING.to_layer(window=5), r"leaves out .*; window=\d+ would do"),
        (lambda: stable(1, 2, 1, 2, pairs=1, radius=0.99).to_layer(), r"a window of 256 leaves out"),
        (lambda: GOOD.to_layer(window=0), "window must be a whole number"),
        (lambda: GOOD.to_layer(hidden_size=2), "hidden_size, .* of at least 3"),
    ],
)
def test_refused(act, word):
    with pytest.raises(RealizationError, match=word):
        act()
