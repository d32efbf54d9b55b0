"""A bilinear model has the Volterra kernels of a smooth system to its order, and no further (Krener, Fliess)."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from bmojo.errors import RealizationError
from bmojo.realize import LTI
from bmojo.realize.bilinear import carleman


def pendulum(x, u):
    """Driven at its pivot: input and state are multiplied."""
    angle, speed = x
    push = -torch.sin(angle) - 0.5 * speed + torch.cos(angle) * u[0] + 0.3 * angle * u[0] ** 2
    return torch.stack((angle + 0.3 * speed, speed + 0.3 * push))


def seen(x):
    return torch.stack((torch.sin(x[0]), x[0] * x[1] + x[1]))


def tanh_cell(x, u):
    W = torch.tensor([[0.5, -0.4], [0.3, 0.6]], dtype=torch.float64)
    return torch.tanh(W @ x + torch.stack((u[0] + 0.5 * u[1], u[1]))) + 0.2 * x * u[0]


SYSTEMS = [(pendulum, seen, 1), (tanh_cell, lambda x: x.sum(0, keepdim=True) ** 2 + x.exp() - 1, 2)]


def kernels(f, g, m, T, order):
    """{(u's and how often each): coefficient [p]} of y(T), by derivatives of the map from all inputs to it."""

    def final(inputs):
        x = torch.zeros(2, dtype=torch.float64)
        for u in inputs.view(T, m):
            x = f(x, u)
        return g(x)

    found, derivative, zero = {}, final, torch.zeros(T * m, dtype=torch.float64)
    for degree in range(1, order + 1):
        derivative = torch.func.jacrev(derivative)
        values = derivative(zero).numpy()
        for which in itertools.combinations_with_replacement(range(T * m), degree):
            scale = math.prod(math.factorial(i) for i in Counter(which).values())
            found[which] = values[:, *which] / scale
    return found


def kernel_of(model, which, m, T):
    """The same coefficient of a bilinear model: all inputs of one moment are one monomial."""
    by_lag = {}
    for index in which:
        t, i = divmod(index, m)
        by_lag.setdefault(T - t, [0] * m)[i] += 1
    known = [tuple(power) for power in model.powers]
    return model.kernel([(lag, known.index(tuple(power))) for lag, power in by_lag.items()])


@pytest.mark.parametrize(("f", "g", "m"), SYSTEMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_kernels_are_equal_to_the_order_and_not_beyond(f, g, m, order):
    T = 3
    smooth = kernels(f, g, m, T, order + 1)
    model = carleman(f, g, states=2, inputs=m, order=order)
    for which, value in smooth.items():
        if len(which) <= order:
            assert_allclose(kernel_of(model, which, m, T), value, rtol=0, atol=1e-12)
    larger = carleman(f, g, states=2, inputs=m, order=order + 1)
    beyond = [which for which in smooth if len(which) == order + 1]
    assert max(np.abs(kernel_of(larger, which, m, T) - smooth[which]).max() for which in beyond) < 1e-12
    gaps = []
    for which in beyond:
        if max(Counter(index // m for index in which).values()) <= order:  # else the model has no such input at all
            gaps.append(np.abs(kernel_of(model, which, m, T) - smooth[which]).max())
    assert max(gaps) > 1e-3


@pytest.mark.parametrize(("f", "g", "m"), SYSTEMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_falls_with_the_power_after_the_order(f, g, m, order):
    model = carleman(f, g, states=2, inputs=m, order=order)
    u = np.random.default_rng(0).standard_normal((12, m))
    errors = []
    for size in (0.02, 0.01):
        x, y = torch.zeros(2, dtype=torch.float64), []
        for step in torch.from_numpy(size * u):
            y.append(g(x).numpy())
            x = f(x, step)
        errors.append(np.abs(model.respond(size * u) - y).max())
    assert 2 ** (order + 0.5) < errors[0] / errors[1] < 2 ** (order + 2.5)


def test_order_one_is_the_linearization():
    model = carleman(pendulum, seen, states=2, inputs=1, order=1)
    assert not model.N.any()
    linear = LTI(model.A, model.B, model.C, np.zeros((2, 1)))
    assert_allclose(linear.A, [[1, 0.3], [-0.3, 0.85]])
    assert_allclose([model.kernel([(lag, 0)]) for lag in range(1, 6)], linear.impulse(5)[1:, :, 0], atol=1e-14)
    u = np.random.default_rng(0).standard_normal((9, 1))
    assert_allclose(model.respond(u), linear.respond(u), atol=1e-12)


def test_the_response_is_the_sum_over_its_kernels():
    """Of a model that is bilinear proper: y(2) has the four products of u(0), u(1)."""
    model = carleman(lambda x, u: 0.5 * x + u * (1 + x), lambda x: x, states=1, inputs=1, order=1)
    assert model.powers.tolist() == [[1]]
    exact = carleman(lambda x, u: 0.5 * x + u * (1 + x), lambda x: x, states=1, inputs=1, order=2)
    u = np.array([[0.3], [-0.7], [0.0]])
    parts = [exact.kernel([(2, 0)]) * u[0], exact.kernel([(1, 0)]) * u[1], exact.kernel([(1, 0), (2, 0)]) * u[0] * u[1]]
    assert_allclose(sum(parts), exact.respond(u)[2], atol=1e-14)
    assert_allclose(exact.respond(u)[2], 0.5 * 0.3 - 0.7 * (1 + 0.3), atol=1e-14)


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda: carleman(lambda x, u: x + 1, lambda x: x, states=1, inputs=1, order=2), "shift the equilibrium"),
        (lambda: carleman(lambda x, u: x, lambda x: x + 1, states=1, inputs=1, order=2), r"g\(0\) must be"),
        (lambda: carleman(lambda x, u: x.abs().sqrt(), lambda x: x, states=1, inputs=1, order=2), "must be finite"),
        (
            lambda: carleman(lambda x, u: x[:1], seen, states=2, inputs=1, order=2),
            "f must give the next 2 states, got 1",
        ),
        (lambda: carleman(lambda x, u: [x[0]], seen, states=1, inputs=1, order=2), "must be a torch tensor, got list"),
        (lambda: carleman(pendulum, seen, states=2, inputs=1, order=0), "order must be"),
        (lambda: carleman(pendulum, seen, states=20, inputs=1, order=5), "takes 53129 states"),
        (lambda: carleman(pendulum, seen, states=2, inputs=1, order=1).kernel([(0, 0)]), "lags that differ"),
        (lambda: carleman(pendulum, seen, states=2, inputs=1, order=1).respond(np.zeros((3, 2))), r"must be \[T, 1\]"),
    ],
)
def test_refused(act, word):
    with pytest.raises(RealizationError, match=word):
        act()
