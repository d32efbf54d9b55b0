"""The statements of docs/theory.md that no other test shows, and that every test and figure it names is there."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from systems import stable

from bmojo.realize import LTI

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/theory.md").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"tests/[\w/]+\.py(?:::\w+)?", PAGE))))
def test_the_page_names_tests_that_are_there(path):
    file, _, name = path.partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^):#]+)\)", PAGE))))
def test_the_page_links_to_what_is_there(link):
    assert (ROOT / "docs" / link).exists()


@pytest.mark.parametrize("seed", range(5))
def test_given_the_state_the_future_does_not_depend_on_the_past(seed):
    """For Gaussians: the covariance of y(t..t+4) and y(t-5..t-1) given x(t) is 0."""
    m, span = stable(seed, 3, 2, 4), 5
    powers = [np.linalg.matrix_power(m.A, j) for j in range(2 * span)]
    L, G = m.covariances(2 * span)
    future_past = np.block([[L[i + j] for j in range(1, span + 1)] for i in range(span)])  # E y(t+i) y(t-j)'
    future_state = np.concatenate([m.C @ powers[i] @ m.stationary for i in range(span)])
    state_past = np.concatenate([powers[j - 1] @ G for j in range(1, span + 1)], 1)  # E x(t) y(t-j)'
    given = future_past - future_state @ np.linalg.solve(m.stationary, state_past)
    assert np.abs(future_past).max() > 1e-3
    assert np.abs(given).max() < 1e-10


@pytest.mark.parametrize("pole", [0.9, 0.5, -0.7])
def test_one_companion_block_holds_the_window_and_the_fading_state(pole):
    """The block of z^N (z - pole): a fixed readout is the last N inputs verbatim, its last coordinate fades."""
    N, T = 4, 60
    A = np.eye(N + 1, k=1)
    A[N, N] = pole
    B = np.eye(N + 1)[:, [N]]
    verbatim = np.eye(N, N + 1, k=1) - pole * np.eye(N, N + 1)
    m = LTI(A, B, np.concatenate((verbatim, np.eye(N + 1)[[N]])), np.zeros((N + 1, 1)))
    h = m.impulse(T)[1:, :, 0]
    np.testing.assert_allclose(h[:, :N], np.eye(T, N)[np.r_[N - 1 : -1 : -1, N:T]], atol=1e-12)
    np.testing.assert_allclose(h[:, N], pole ** np.arange(T), atol=1e-12)


def test_a_window_is_no_sum_of_fading_modes():
    """Its A is nilpotent: one eigenvector for N states, so it can't be made diagonal."""
    A = stable(0, 3, 1, 1).shift(6).A
    assert np.linalg.matrix_rank(A) == 5
    assert not np.linalg.matrix_power(A, 6).any()


@pytest.mark.parametrize("seed", range(3))
def test_the_backward_model_of_a_diffusion_has_the_drift_of_its_score(seed):
    """dx = F x dt + g dw, sampled every dt: backward in time dx = -(F + g g' P^-1) x dt, the drift
    F x - g g' grad log p turned round, p = N(0, P) the stationary density, as dt goes to 0."""
    draw = np.random.default_rng(seed)
    F, g = draw.standard_normal((2, 3, 3))
    F -= (1 + np.linalg.eigvals(F).real.max()) * np.eye(3)
    square = np.eye(3)
    P = np.linalg.solve(np.kron(F, square) + np.kron(square, F), -(g @ g.T).ravel()).reshape(3, 3)
    errors = []
    for dt in (1e-3, 1e-4):
        A = square + F * dt + F @ F * dt**2 / 2
        noise = P - A @ P @ A.T
        m = LTI(A, np.linalg.cholesky((noise + noise.T) / 2), square, np.zeros((3, 3)))
        backward = m.stationary @ m.reverse().A @ np.linalg.inv(m.stationary)  # x(t) given x(t + dt)
        drift = (backward - square) / dt
        errors.append(np.abs(drift + F + g @ g.T @ np.linalg.inv(P)).max())
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 1e-2
