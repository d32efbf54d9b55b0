"""Every identity of realization theory over random stable systems; agreement with control and statsmodels; refusals."""

from __future__ import annotations

import control
import numpy as np
import pytest
import slycot
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from systems import stable, systems

from bmojo.errors import RealizationError
from bmojo.realize import LTI


def close(a, b, digits=9):
    """As matrices: the largest difference, relative to the largest entry."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 10.0**-digits * max(np.abs(b).max(), 1e-300)


def noise_of(m):
    """The joint covariance of the noises of state and output."""
    N = np.concatenate((m.B, m.D))
    return N @ N.T


@given(systems(square=True))
def test_covariances_are_those_of_the_impulse_response(m):
    L, G = m.covariances(4)
    h = m.impulse(6000)  # L_h = sum_j h_(j+h) h_j'
    for lag in range(5):
        close(L[lag], np.einsum("jam,jbm->ab", h[lag:], h[: len(h) - lag]))
    P = m.stationary
    close(P, m.A @ P @ m.A.T + m.B @ m.B.T)
    close(G, m.A @ P @ m.C.T + m.B @ m.D.T)
    for lag in range(1, 5):
        close(L[lag], m.C @ np.linalg.matrix_power(m.A, lag - 1) @ G)


@given(systems(square=True))
def test_innovations_form(m):
    K, R_e, P_ = m.innovations()
    L, G = m.covariances(5)
    form = LTI.from_innovations(m.A, K, m.C, R_e)
    close(form.covariances(5)[0], L)
    close(form.stationary, P_, 8)
    close(R_e, L[0] - m.C @ P_ @ m.C.T)
    close(K, (G - m.A @ P_ @ m.C.T) @ np.linalg.inv(R_e))
    close(P_, m.A @ P_ @ m.A.T + K @ R_e @ K.T)
    assert np.abs(np.linalg.eigvals(m.A - K @ m.C)).max() < 1
    assert np.linalg.eigvalsh(m.stationary - P_)[0] >= -1e-9 * np.abs(m.stationary).max()  # P_ is the smallest
    again = form.innovations()  # the innovations form of the innovations form is itself
    close(again.R_e, R_e, 8)
    close(again.K, K, 7)


@given(systems(square=True))
def test_kalman_filter_is_the_conditional_mean_of_the_gaussian(m):
    T, p = 6, m.sizes[2]
    y = m.simulate(T, 3)
    L, _ = m.covariances(T)
    joint = np.block([[L[i - j] if i >= j else L[j - i].T for j in range(T)] for i in range(T)])
    found = m.kalman(y)
    for t in range(1, T):
        past, cross = joint[: t * p, : t * p], joint[t * p : (t + 1) * p, : t * p]
        assert_allclose(found.predictions[t], cross @ np.linalg.solve(past, y[:t].ravel()), rtol=1e-6, atol=1e-8)
    sign, log_det = np.linalg.slogdet(joint)
    log_density = -0.5 * (y.ravel() @ np.linalg.solve(joint, y.ravel()) + log_det + T * p * np.log(2 * np.pi))
    assert sign == 1
    assert_allclose(found.log_likelihood, log_density, rtol=1e-8, atol=1e-8)
    batch = m.kalman(np.stack((y, 2 * y)))
    assert_allclose(batch.bits[0], found.bits, rtol=1e-12)
    assert_allclose(batch.predictions[1], 2 * found.predictions, rtol=1e-12, atol=1e-13)


@given(systems())
def test_the_filter_settles_at_the_steady_state(m):
    y = m.simulate(2000, 1)
    exact, steady = m.kalman(y), m.kalman(y, steady=True)
    close(exact.covariances[-1], m.innovations().R_e)
    assert_allclose(exact.innovations[-1], steady.innovations[-1], rtol=1e-5, atol=1e-5)
    assert abs(exact.bits.mean() - steady.bits.mean()) < 0.05


@given(systems())
def test_the_state_splits_past_and_future(m):
    """Given x(t) they are uncorrelated: Cov(future, past) = Cov(future, x) P^-1 Cov(x, past)."""
    T = 4
    L, G = m.covariances(2 * T)
    powers = [np.linalg.matrix_power(m.A, j) for j in range(T)]
    both = np.block([[L[i + j + 1] for j in range(T)] for i in range(T)])  # y(t+i) and y(t-1-j)
    future = np.concatenate([m.C @ power @ m.stationary for power in powers])
    past = np.concatenate([power @ G for power in powers], 1)
    close(future @ np.linalg.solve(m.stationary, past), both, 8)


@given(systems(), st.sampled_from([1e-3, 0.1, 1.0]))
def test_diffusions_reverse_by_the_gradient_of_the_log_density(m, step):
    """dx = F x dt + g dw backwards has the drift F x - g g' grad log p, with grad log p = -P^-1 x. Samples of it
    at intervals of `step` are a system whose backward model, in the coordinates of x, is that drift's flow."""
    from scipy.linalg import expm, solve_continuous_lyapunov

    n = m.sizes[0]
    F, g = m.A - np.eye(n), m.B  # stable, as A is
    P = solve_continuous_lyapunov(F, -g @ g.T)
    drift = F + g @ g.T @ np.linalg.inv(P)
    close(drift, -P @ F.T @ np.linalg.inv(P), 7)
    A = expm(F * step)
    noise = P - A @ P @ A.T
    values, vectors = np.linalg.eigh(noise)
    sampled = LTI(A, vectors * np.sqrt(np.maximum(values, 0)), np.eye(n), np.zeros((n, n)))
    close(sampled.stationary, P, 6)
    in_x = P @ sampled.reverse().A @ np.linalg.inv(P)
    close(in_x, expm(-drift * step), 6)


@given(systems())
def test_backward_model(m):
    P, n = m.stationary, m.sizes[0]
    L, G = m.covariances(6)
    back = m.reverse()
    close(back.A, m.A.T)
    close(back.C, G.T)
    close(back.stationary @ P, np.eye(n), 7)
    close(back.covariances(6)[0], L.transpose(0, 2, 1), 8)
    inverse = np.linalg.inv(P)
    noise = np.block([[inverse - m.A.T @ inverse @ m.A, m.C.T - m.A.T @ inverse @ back.C.T],
                      [(m.C.T - m.A.T @ inverse @ back.C.T).T, L[0] - back.C @ inverse @ back.C.T]])  # fmt: skip
    close(noise_of(back), noise, 7)
    assert np.linalg.eigvalsh(noise)[0] >= -1e-9 * np.abs(noise).max()
    in_x = P @ m.A.T @ inverse  # in the coordinates of x
    assert_allclose(np.sort(np.abs(np.linalg.eigvals(in_x))), np.sort(np.abs(m.poles)), rtol=1e-6, atol=1e-7)


@given(systems())
def test_reversed_twice_is_the_same_system(m):
    twice = m.reverse().reverse()
    for name in "ABCD":
        close(getattr(twice, name), getattr(m, name), 6)
    close(noise_of(twice), noise_of(m), 7)


def test_reversed_twice_where_a_pole_is_zero():
    m = stable(1, 3, 2, 3).shift(4).whitened()
    twice = m.reverse().reverse()
    close(twice.A, m.A)
    close(twice.C, m.C)
    close(noise_of(twice), noise_of(m))


@given(systems())
def test_spectrum_of_the_backward_model_is_the_transpose(m):
    def spectrum(s, z):
        W = s.C @ np.linalg.solve(z * np.eye(s.sizes[0]) - s.A, s.B) + s.D
        return W @ W.conj().T

    z = np.exp(1.3j)
    close(spectrum(m.reverse(), z), spectrum(m, z).T, 8)


def test_simulation_has_the_covariances_forward_and_backward():
    m = stable(5, 4, 2, 4, radius=0.8, pairs=1)
    for system, seed in ((m, 0), (m.reverse(), 1)):
        y = system.simulate(200, seed, batch=2000)
        for lag, L in enumerate(system.covariances(3)[0]):
            pairs = y[:, lag:, :, None] * y[:, : 200 - lag, None, :]
            means = pairs.mean(1)  # one a series: independent
            error = (means.mean(0) - L) / (means.std(0) / np.sqrt(len(means)))
            assert np.abs(error).max() < 4.5, lag


@given(systems())
def test_forms_keep_the_markov_parameters(m):
    h = m.impulse(12)
    modal = m.to_modal()
    close(modal.impulse(12), h, 8)
    assert np.all((modal.A == 0) | (np.abs(np.subtract.outer(*[np.arange(len(m.A))] * 2)) <= 1))
    full, bound = m.balanced()
    assert bound == 0
    close(full.impulse(12), h, 7)
    close(full.stationary, np.diag(m.hankel), 6)
    close(full.observability, np.diag(m.hankel), 6)
    close(m.whitened().impulse(12), h, 8)
    close(m.whitened().stationary, np.eye(m.sizes[0]), 8)


@given(systems(), st.integers(0, 2))
def test_companion_form(m, output):
    output = min(output, m.sizes[2] - 1)
    form = m.to_companion(output)
    n = m.sizes[0]
    close(form.impulse(12), m.impulse(12), 6)
    assert np.array_equal(form.A[:-1], np.eye(n, k=1)[:-1])
    assert np.array_equal(form.C[output], np.eye(n)[0])
    assert_allclose(form.A[-1], -np.poly(m.A)[:0:-1], rtol=1e-5, atol=1e-7)


def ringing(poles):
    """One output that sees each of `poles`, and their conjugates, equally."""
    blocks = [np.array([[z.real, z.imag], [-z.imag, z.real]]) for z in poles]
    A = np.zeros((2 * len(blocks),) * 2)
    for i, block in enumerate(blocks):
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    n = len(A)
    return LTI(A, np.eye(n), np.tile([[1.0, 0.0]], len(blocks)), np.zeros((1, n)))


def test_companion_form_of_many_poles():
    """64 on a ring have a condition number of 4, 32 real ones of 1e14: refused."""
    ring = ringing(np.exp(1j * np.pi * (np.arange(32) + 0.5) / 32) * 0.98)
    close(ring.to_companion().impulse(70), ring.impulse(70), 10)
    n = 32
    real = LTI(np.diag(np.linspace(-0.95, 0.95, n)), np.eye(n), np.ones((1, n)), np.zeros((1, n)))
    with pytest.raises(RealizationError, match=r"condition number 5.2e\+14 is above 1e\+08"):
        real.to_companion()
    close(real.to_modal().impulse(70), real.impulse(70))


@given(systems(), st.integers(1, 7))
def test_window_is_nilpotent(m, window):
    form = m.shift(window)
    h = m.impulse(window + 4)
    assert not np.linalg.matrix_power(form.A, window).any()
    assert np.array_equal(form.impulse(window + 4)[: window + 1], h[: window + 1])
    assert not form.impulse(window + 4)[window + 1 :].any()


@given(systems(), st.data())
def test_balanced_truncation_is_within_its_bound(m, data):
    r = data.draw(st.integers(1, m.sizes[0]))
    small, bound = m.balanced(r)
    assert small.radius < 1
    worst = 0.0
    for angle in np.linspace(0, np.pi, 60):
        gap = np.zeros((m.sizes[2], m.sizes[1]), complex)
        for system, sign in ((m, 1), (small, -1)):
            resolvent = np.exp(1j * angle) * np.eye(system.sizes[0]) - system.A
            gap += sign * (system.C @ np.linalg.solve(resolvent, system.B) + system.D)
        worst = max(worst, np.linalg.norm(gap, 2))
    assert worst <= bound * (1 + 1e-6) + 1e-9


def test_agrees_with_control():
    m = stable(11, 4, 2, 4, pairs=1)
    system = control.ss(m.A, m.B, m.C, m.D, 1)
    close(m.stationary, control.gram(system, "c"))
    close(m.observability, control.gram(system, "o"))
    close(m.impulse(6), np.moveaxis(control.impulse_response(system, T=np.arange(7)).outputs, 2, 0))
    # control's balred takes every system for a continuous one: ask what it calls
    _, *reduced, values = slycot.ab09ad("D", "B", "N", 4, 4, 2, m.A, m.B, m.C, nr=2)
    close(m.hankel, values)
    mine, _ = m.balanced(2)
    close(mine.impulse(6), LTI(*reduced, m.D).impulse(6), 8)
    independent = LTI(m.A, np.pad(m.B, ((0, 0), (0, 2))), m.C, np.pad(np.eye(2), ((0, 0), (4, 0))))
    gain, sigma, _ = control.dlqe(m.A, np.eye(4), m.C, m.B @ m.B.T, np.eye(2))
    found = independent.innovations()
    close(found.K, gain)
    close(found.R_e, m.C @ sigma @ m.C.T + np.eye(2))
    single = stable(12, 4, 1, 2, pairs=1)
    siso = control.ss(single.A, single.B[:, :1], single.C, single.D[:, :1], 1)
    theirs, _ = control.canonical_form(siso, "observable")
    close(single.to_companion().A[-1], -np.poly(theirs.A)[:0:-1], 8)
    close(single.to_companion().A[-1], theirs.A[:, 0][::-1], 8)  # its transpose
    modal, _ = control.canonical_form(siso, "modal")
    assert_allclose(np.sort(np.abs(np.diag(modal.A))), np.sort(np.abs(np.diag(single.to_modal().A))), rtol=1e-8)


def test_agrees_with_statsmodels():
    from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

    m = stable(21, 3, 2, 5)
    y = m.simulate(300, 2)
    # their noises of state and output are independent: take [x; D w] as the state
    n, _, p = m.sizes
    theirs = KalmanFilter(k_endog=p, k_states=n + p)
    theirs.bind(y)
    P = m.stationary
    theirs["design"] = np.concatenate((m.C, np.eye(p)), 1)
    transition = np.zeros((n + p, n + p))
    transition[:n, :n] = m.A
    # x(t+1) = A x + B w(t) needs the w of the output: B w = S R^-1 (D w) + the rest
    S, R = m.B @ m.D.T, m.D @ m.D.T
    transition[:n, n:] = S @ np.linalg.inv(R)
    cov = np.zeros((n + p, n + p))
    cov[:n, :n] = m.B @ m.B.T - S @ np.linalg.inv(R) @ S.T
    cov[n:, n:] = R
    theirs["transition"], theirs["selection"], theirs["state_cov"] = transition, np.eye(n + p), cov
    start = np.zeros((n + p, n + p))
    start[:n, :n], start[n:, n:] = P, R
    theirs.initialize_known(np.zeros(n + p), start)
    result = theirs.filter()
    mine = m.kalman(y)
    assert_allclose(mine.log_likelihood, result.llf_obs.sum(), rtol=1e-10)
    assert_allclose(mine.predictions, result.forecasts.T, rtol=1e-7, atol=1e-9)


GOOD = stable(0, 2, 1, 2)
ONES = np.ones((1, 1))


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda: LTI(np.eye(2), np.ones((3, 1)), np.ones((1, 2)), ONES), "must fit one another"),
        (lambda: LTI(np.ones(2), ONES, ONES, ONES), "A must be a matrix"),
        (lambda: LTI(ONES * np.nan, ONES, ONES, ONES), "A must be finite"),
        (lambda: LTI([["a"]], ONES, ONES, ONES), "A must be real numbers"),
        (lambda: LTI(1j * ONES, ONES, ONES, ONES), "A must be real numbers"),
        (lambda: LTI(ONES, ONES, 1e160 * ONES, ONES), r"C must be at most 1e\+150, got 1e\+160"),
        (lambda: LTI(ONES, ONES, ONES, ONES).stationary, "unstable: its largest pole has modulus 1"),
        (lambda: LTI(1.2 * ONES, ONES, ONES, ONES).kalman(np.zeros((3, 1))), "unstable"),
        (lambda: LTI(0.5 * np.eye(2), np.ones((2, 1)), np.ones((1, 2)), ONES).reverse(), "uncontrollable"),
        (lambda: LTI(0.5 * np.eye(2), np.ones((2, 1)), np.ones((1, 2)), ONES).whitened(), "uncontrollable"),
        (lambda: LTI(0.5 * np.eye(2), np.eye(2), np.ones((1, 2)), np.ones((1, 2))).to_companion(), "unobservable"),
        (lambda: LTI(0.5 * np.eye(2), np.eye(2), np.ones((1, 2)), np.ones((1, 2))).balanced(), "not minimal"),
        (lambda: LTI([[0.5, 1], [0, 0.5]], np.eye(2), np.ones((1, 2)), np.ones((1, 2))).to_modal(), "coincide"),
        (lambda: stable(0, 30, 1, 2, positive=True).to_companion(), "above 1e\\+08"),
        (lambda: GOOD.to_companion(3), "output must be"),
        (lambda: GOOD.balanced(3), r"r must be a whole number in 1 ... 2, got 3"),
        (lambda: GOOD.simulate(0), "the number of samples must be a whole number of at least 1, got 0"),
        (lambda: GOOD.simulate(5, start=np.zeros(3)), r"start must be \[2\]"),
        (lambda: GOOD.respond(np.zeros((5, 3))), "an input must be"),
        (lambda: GOOD.shift(0), "window must be"),
        (lambda: GOOD.shift(2.5), "window must be a whole number of at least 1, got 2.5"),
        (lambda: GOOD.impulse(-1), "the number of lags must be"),
        (
            lambda: LTI([[0.9, 1e149], [0, 0.9]], 1e149 * np.eye(2), np.ones((1, 2)), np.ones((1, 2))).stationary,
            "float64 holds",
        ),
        (lambda: GOOD.transform(np.diag([1, 1e-9])), "condition number 1e\\+09"),
        (lambda: GOOD.kalman(np.zeros((5, 2))), "a series must be"),
        (lambda: GOOD.kalman(np.full((5, 1), np.nan)), "must be finite"),
        (lambda: LTI(0.5 * ONES, ONES, np.ones((2, 1)), np.zeros((2, 1))).innovations(), "positive definite"),
        (lambda: LTI.from_innovations(0.5 * ONES, ONES, ONES, -ONES), "R_e"),
        (lambda: LTI(0 * ONES, -ONES, ONES, ONES).innovations(), "zero of modulus 0.9999999"),
    ],
)
def test_refused(act, word):
    with pytest.raises(RealizationError, match=word):
        act()


def test_it_is_a_value():
    with pytest.raises(ValueError, match="read-only"):
        GOOD.A[0, 0] = 1
    given_A = np.eye(1) / 2
    m = LTI(given_A, ONES, ONES, ONES)
    given_A[:] = 3
    assert m.radius == 0.5
    assert repr(m) == "LTI(1 states, 1 noises, 1 outputs, largest pole 0.5)"
