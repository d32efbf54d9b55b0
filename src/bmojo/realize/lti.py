"""Linear time-invariant systems driven by white noise, and the forms that one and the same process has.

    x(t+1) = A x(t) + B w(t),   y(t) = C x(t) + D w(t),   w white of unit covariance

With P = A P A' + B B' the covariance of the stationary state, the process y is known by its covariances alone:

    L_0 = C P C' + D D',   G = A P C' + B D',   L_h = E y(t+h) y(t)' = C A^(h-1) G

and systems with the same L are realizations of the same process. Shapes: n states, m noises, p outputs; A [n, n],
B [n, m], C [p, n], D [p, m]; series y [..., T, p]. Everything is float64. A change of coordinates whose condition
number is above 1e8 is refused, for it would leave fewer than 8 of 16 digits.
Source: Lindquist and Picci, Linear Stochastic Systems, 2015.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bmojo.errors import RealizationError

if TYPE_CHECKING:
    from bmojo.nn.mixer import Mixer

MAX_CONDITION = 1e8
LARGEST = 1e150  # of a number: the squares of larger ones overflow
Array = np.ndarray


class Innovations(NamedTuple):
    """x(t+1) = A x(t) + K e(t), y(t) = C x(t) + e(t): the realization whose noise is the error of predicting y."""

    K: Array  # [n, p]
    R_e: Array  # [p, p], covariance of e
    P_: Array  # [n, n], covariance of its state: what the past of y tells of x


class Filtered(NamedTuple):
    """What the Kalman filter says of a series y [..., T, p], each sample given all before it."""

    predictions: Array  # [..., T, p]
    innovations: Array  # [..., T, p]: y - predictions
    covariances: Array  # [S, p, p] of the innovations; they have settled at sample S <= T, and the last one stays
    bits: Array  # [..., T]: -log2 of the density of each sample

    @property
    def log_likelihood(self) -> Array:
        """The log density of each series, in nats: [...]."""
        return -np.log(2) * self.bits.sum(-1)


@dataclass(frozen=True, eq=False)
class LTI:
    """The system (A, B, C, D) of this module's equations. Raises RealizationError unless the four are finite real
    matrices of fitting shapes."""

    A: Array = field(repr=False)
    B: Array = field(repr=False)
    C: Array = field(repr=False)
    D: Array = field(repr=False)

    def __post_init__(self) -> None:
        for name in "ABCD":
            object.__setattr__(self, name, _matrix(name, getattr(self, name)))
        n, m, p = self.A.shape[0], self.B.shape[1], self.C.shape[0]
        for name, shape in (("A", (n, n)), ("B", (n, m)), ("C", (p, n)), ("D", (p, m))):
            if getattr(self, name).shape != shape:
                shapes = ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in "ABCD")
                raise RealizationError(f"A [n, n], B [n, m], C [p, n] and D [p, m] must fit one another, got {shapes}")

    @classmethod
    def from_innovations(cls, A: Array, K: Array, C: Array, R_e: Array) -> LTI:
        """x(t+1) = A x + K e, y = C x + e with e of covariance R_e, which must be positive definite: e = R_e^(1/2) w,
        by Cholesky."""
        root = _cholesky(_matrix("R_e", R_e), "R_e, the covariance of the innovations,")
        return cls(A, _matrix("K", K) @ root, C, root)

    def __repr__(self) -> str:
        n, m, p = self.sizes
        return f"LTI({n} states, {m} noises, {p} outputs, largest pole {self.radius:.6g})"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n, m, p: the numbers of states, noises and outputs."""
        return self.A.shape[0], self.B.shape[1], self.C.shape[0]

    # what the process is
    @cached_property
    def poles(self) -> Array:
        """The eigenvalues of A, complex, largest first."""
        poles = np.linalg.eigvals(self.A).astype(complex)
        return poles[np.argsort(-np.abs(poles), kind="stable")]

    @property
    def radius(self) -> float:
        """The largest modulus of a pole; the system is stable where it is below 1."""
        return float(np.abs(self.poles[0]))

    @cached_property
    def stationary(self) -> Array:
        """P [n, n], the covariance of the state: P = A P A' + B B'. Refused if unstable."""
        return _lyapunov(self._stable().A, self.B @ self.B.T)

    @cached_property
    def observability(self) -> Array:
        """W [n, n], the observability gramian: W = A' W A + C' C. Refused if unstable."""
        return _lyapunov(self._stable().A.T, self.C.T @ self.C)

    def covariances(self, n: int) -> tuple[Array, Array]:
        """L [n + 1, p, p] with L[h] = E y(t+h) y(t)', and G [states, p] = E x(t+1) y(t)'."""
        G = self.A @ self.stationary @ self.C.T + self.B @ self.D.T
        L_0 = _symmetric(self.C @ self.stationary @ self.C.T + self.D @ self.D.T)
        return np.concatenate((L_0[None], self._markov(G, n))), G

    def impulse(self, n: int) -> Array:
        """The Markov parameters h [n + 1, p, m], h_0 = D and h_j = C A^(j-1) B: y(t) = sum_j h_j w(t-j)."""
        return np.concatenate((self.D[None], self._markov(self.B, n)))

    def _markov(self, x: Array, n: int) -> Array:
        """C A^j x, j < n: [n, p, columns of x]."""
        whole("the number of lags", n, 0)
        rows = np.empty((n, self.C.shape[0], x.shape[1]))
        for j in range(n):
            rows[j], x = self.C @ x, self.A @ x
        return rows

    def simulate(self, n: int, seed: int = 0, *, batch: int | None = None, start: Array | None = None) -> Array:
        """y [n, p], or [batch, n, p] of independent series, from the state `start` [states], else a stationary one."""
        whole("the number of samples", n, 1)
        series, states = 1 if batch is None else whole("batch", batch, 1), self.A.shape[0]
        rng = np.random.default_rng(whole("seed", seed, 0))
        if start is None:
            x = rng.standard_normal((series, states)) @ _root(self.stationary).T
        else:
            x = numbers("start", start)
            if x.shape != (states,):
                raise RealizationError(f"start must be [{states}], the state, got {list(x.shape)}")
            x = np.broadcast_to(x, (series, states))
        w = rng.standard_normal((n, series, self.B.shape[1]))
        x = _run(self.A, w @ self.B.T, x)
        y = np.moveaxis(x @ self.C.T + w @ self.D.T, 0, 1)
        return y[0] if batch is None else y

    def respond(self, u: Array) -> Array:
        """y [..., T, p] of this system where its input is u [..., T, m] in place of noise, from the state 0."""
        u = numbers("the input", u)
        if u.ndim < 2 or u.shape[-1] != self.B.shape[1]:
            raise RealizationError(f"an input must be [..., T, {self.B.shape[1]}], got {list(u.shape)}")
        steps = np.moveaxis(u, -2, 0)
        x = _run(self.A, steps @ self.B.T, np.zeros((*u.shape[:-2], self.A.shape[0])))
        return np.moveaxis(x @ self.C.T + steps @ self.D.T, 0, -2)

    # prediction
    def innovations(self) -> Innovations:
        """K, R_e, P_ of the innovations form; `LTI.from_innovations(A, K, C, R_e)` has the covariances L of this one.

        P_ = A P_ A' + K R_e K',  R_e = L_0 - C P_ C',  K = (G - A P_ C') R_e^-1,  A - K C stable; P - P_ is the
        stabilising solution of the Kalman filter's Riccati equation. Refused if unstable, if an output is predicted
        without error, or if the process has a zero on the unit circle (then no prediction of finite memory comes near).
        """
        sigma = self._riccati()
        K, R_e = self._gain(sigma)
        return Innovations(K, R_e, _symmetric(self.stationary - sigma))

    def kalman(self, y: Array, *, steady: bool = False) -> Filtered:
        """The best linear prediction of y [..., T, p] from its own past, and its code length.

        The filter starts from x = 0 with covariance P and is exact for every T; `steady=True` takes the gain and the
        covariance of the innovations form from the first sample on.
        """
        y = numbers("the series", y)
        if y.ndim < 2 or y.shape[-1] != self.C.shape[0] or y.shape[-2] < 1:
            raise RealizationError(f"a series must be [..., T, {self.C.shape[0]}] with T >= 1, got {list(y.shape)}")
        steps = self._gains(self._riccati() if steady else self.stationary)
        gains, covariances = zip(*itertools.islice(steps, y.shape[-2]), strict=True)
        x, last = np.zeros((*y.shape[:-2], self.A.shape[0])), len(gains) - 1
        predictions, white = np.empty_like(y), np.empty_like(y)
        for t in range(y.shape[-2]):
            predictions[..., t, :] = x @ self.C.T
            x = x @ self.A.T + (y[..., t, :] - predictions[..., t, :]) @ gains[min(t, last)].T
        innovations, roots = y - predictions, np.linalg.cholesky(np.stack(covariances))
        for t, root in enumerate(roots):
            rows = slice(t, None if t == last else t + 1)
            white[..., rows, :] = innovations[..., rows, :] @ np.linalg.inv(root).T
        log_dets = 2 * np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)
        log_det = np.append(log_dets, np.full(y.shape[-2] - last - 1, log_dets[-1]))
        nats = 0.5 * (np.square(white).sum(-1) + log_det + y.shape[-1] * np.log(2 * np.pi))
        return Filtered(predictions, innovations, np.stack(covariances), nats / np.log(2))

    def predictor(self) -> LTI:
        """The steady Kalman filter as a system from y to its predictions: (A - K C, K, C, 0)."""
        K, _, _ = self.innovations()
        return LTI(self.A - K @ self.C, K, self.C, np.zeros((len(self.C), len(self.C))))

    def excess(self, model: LTI) -> float:
        """What predicting this process by the steady filter of `model` costs: log det of the covariance of its one-step
        errors less that of the best, log det R_e >= 0, in nats (twice the excess code length of a sample). Exact: by
        the joint covariance of both states, without a sample."""
        K, R_e, _ = self.innovations()
        own = model.innovations().K
        if model.sizes[2] != self.sizes[2]:
            raise RealizationError(f"both must have as many outputs, got {self.sizes[2]} and {model.sizes[2]}")
        n = self.A.shape[0]
        A = np.block([[self.A, np.zeros((n, len(model.A)))], [own @ self.C, model.A - own @ model.C]])
        B = np.concatenate((K, own)) @ _cholesky(R_e, "the covariance of the innovations")
        C = np.concatenate((self.C, -model.C), 1)
        error = C @ _lyapunov(A, B @ B.T) @ C.T + R_e
        return float(np.linalg.slogdet(np.linalg.solve(R_e, error))[1])

    def _gain(self, sigma: Array) -> tuple[Array, Array]:
        """K and R_e of the filter whose error has covariance sigma."""
        R_e = _symmetric(self.C @ sigma @ self.C.T + self.D @ self.D.T)
        root = _cholesky(R_e, "the covariance of the innovations")
        cross = self.A @ sigma @ self.C.T + self.B @ self.D.T
        return np.linalg.solve(root.T, np.linalg.solve(root, cross.T)).T, R_e

    def _gains(self, sigma: Array) -> Iterator[tuple[Array, Array]]:
        """K_t and R_t from covariance sigma of the first error on, until they settle."""
        scale, last = max(np.abs(self.stationary).max(), np.finfo(float).tiny), np.inf
        while True:
            K, R_e = self._gain(sigma)
            yield K, R_e
            F, noise = self.A - K @ self.C, self.B - K @ self.D
            new = _symmetric(F @ sigma @ F.T + noise @ noise.T)  # Joseph's form, which keeps it positive
            change = np.abs(new - sigma).max() / scale
            if change <= 1e-15 or last <= change <= 1e-11:  # the second: what rounding leaves
                return
            sigma, last = new, change

    def _riccati(self) -> Array:
        """The stabilising sigma = E (x - E[x | past of y]) (...)', by Newton's method from the gain 0: each covariance
        is that of an observer, each gain the best for it (Kleinman 1968, Hewer 1971). D D' may be singular."""
        sigma, last = self.stationary, np.inf
        for _ in range(100):
            K, _ = self._gain(sigma)
            F, noise = self.A - K @ self.C, self.B - K @ self.D
            zero = np.abs(np.linalg.eigvals(F)).max()
            if zero > 1 - 1e-7:
                break
            new = _lyapunov(F, noise @ noise.T)
            change = np.abs(new - sigma).max() / max(np.abs(self.stationary).max(), np.finfo(float).tiny)
            if change <= 1e-15 or last <= change <= 1e-9:  # the second: what rounding leaves
                return new
            sigma, last = new, change
        raise RealizationError(
            f"the process has a zero of modulus {zero:.9g}, on the unit circle or next to it, so that no prediction of "
            "finite memory comes near the best; add noise to the outputs (D)"
        )

    # other coordinates
    def transform(self, T: Array) -> LTI:
        """The same process in the coordinates T x: (T A T^-1, T B, C T^-1, D). Refused if cond(T) is above 1e8."""
        T = _matrix("T", T)
        if T.shape != self.A.shape:
            raise RealizationError(f"T must be {list(self.A.shape)} as A, got {list(T.shape)}")
        _conditioned(T, "these coordinates")
        inverse = np.linalg.inv(T)
        return LTI(T @ self.A @ inverse, T @ self.B, self.C @ inverse, self.D)

    def whitened(self) -> LTI:
        """In coordinates where the stationary covariance is I: x = P^(1/2) z. Refused if uncontrollable, as far as
        cond(P^(1/2)) above 1e8."""
        values, vectors = np.linalg.eigh(self.stationary)
        roots = np.sqrt(np.where(values > 1e-15 * values[-1], values, 0))  # below is rounding
        _well(roots.max(), roots.min(), "whitened coordinates", "the system is uncontrollable: P is singular")
        return self.transform((vectors / roots) @ vectors.T)

    def to_modal(self) -> LTI:
        """A block diagonal: [r] for a real pole, [[a, b], [-b, a]] for a pair a +- bi; largest pole first. Refused if
        the eigenvectors, of length 1, have condition number above 1e8: poles that coincide, or nearly."""
        values, vectors = np.linalg.eig(self.A)
        A, V, i = np.zeros_like(self.A), np.empty_like(self.A), 0
        for j in np.argsort(-np.abs(values), kind="stable"):
            z, v = values[j], vectors[:, j]
            if z.imag == 0:
                A[i, i], V[:, i], i = z.real, v.real, i + 1
            elif z.imag > 0:
                v = v * np.exp(-0.5j * np.angle(v @ v))  # the phase in which the two columns are orthogonal
                A[i : i + 2, i : i + 2] = [[z.real, z.imag], [-z.imag, z.real]]
                V[:, i], V[:, i + 1], i = v.real, v.imag, i + 2
        _conditioned(V, "modal coordinates", "poles coincide, or nearly so; keep this form, or companion form")
        return LTI(A, np.linalg.solve(V, self.B), self.C @ V, self.D)

    def to_companion(self, output: int = 0) -> LTI:
        """A = shift + last row: ones above the diagonal and the last row -a, a the coefficients of A's characteristic
        polynomial; C[output] = [1 0 ... 0], so the state predicts `output` at t, t+1, ..., t+n-1.

        a = 0 is the nilpotent window, distinct roots are a diagonal system: one family has both. The coordinates are
        the rows C[output] A^k; refused if their condition number is above 1e8: real poles allow some 10 to 20 states,
        poles on a ring any number. Refused by the same number if the system is unobservable from that output.
        """
        n, _, p = self.sizes
        whole("output", output, 0, p - 1)
        rows = [self.C[output]]
        for _ in range(n):
            rows.append(rows[-1] @ self.A)
        T = np.stack(rows[:n])
        why = f"unobservable from output {output}, or poles too close for this form; try another output, or to_modal"
        _conditioned(T, "companion coordinates", why)
        A, C = np.eye(n, k=1), np.linalg.solve(T.T, self.C.T).T
        A[-1] = np.linalg.solve(T.T, rows[n])
        C[output] = np.eye(n)[0]
        return LTI(A, T @ self.B, C, self.D)

    def shift(self, window: int) -> LTI:
        """The nilpotent window: the state is the last `window` inputs, newest first, A the block shift (A^window = 0),
        C = [h_1 ... h_window]. It has the Markov parameters of this system to `window` and none beyond, as a
        Transformer whose window is that."""
        whole("window", window, 1)
        m = self.B.shape[1]
        h = self.impulse(window)[1:]
        return LTI(np.eye(window * m, k=-m), np.eye(window * m, m), np.concatenate(list(h), 1), self.D)

    @cached_property
    def hankel(self) -> Array:
        """The Hankel singular values, largest first: the square roots of the eigenvalues of P W, with the gramians P of
        controllability (`stationary`) and W of `observability`. As many as are not zero is the minimal order."""
        return np.linalg.svd(_root(self.observability).T @ _root(self.stationary), compute_uv=False)

    def balanced(self, r: int | None = None) -> tuple[LTI, float]:
        """The r states that matter most (None: all), where both gramians are diag(hankel), and the bound
        2 sum_{i > r} hankel_i on the error of the transfer function, at every frequency (H-infinity norm).

        Truncated by the square-root method. Refused if unstable, or if hankel_1 / hankel_r is above 1e8: the system is
        not minimal, uncontrollable or unobservable, and fewer states give the same.
        Source: Moore 1981; Enns 1984; Glover 1984.
        """
        n = self.A.shape[0]
        r = n if r is None else whole("r", r, 1, n)
        left, right = _root(self.observability), _root(self.stationary)
        U, values, V = np.linalg.svd(left.T @ right)
        kept = int((values * MAX_CONDITION >= values[0]).sum())
        why = f"not minimal (uncontrollable or unobservable): {kept} states give the same; ask for r <= {kept}"
        _well(values[0], values[r - 1], "balanced coordinates", why)
        scale = np.sqrt(values[:r])
        to, back = (left @ U[:, :r] / scale).T, right @ V[:r].T / scale
        return LTI(to @ self.A @ back, to @ self.B, self.C @ back, self.D), float(2 * values[r:].sum())

    def reverse(self) -> LTI:
        """The backward model: the same process in reversed time, s = -t, as an LTI whose state is P^-1 x(t+1).

            xb(t-1) = A' xb(t) + Bb wb(t),   y(t) = Cb xb(t) + Db wb(t),   Cb = C P A' + D B' = G',   Pb = P^-1
            Bb Bb' = P^-1 - A' P^-1 A,   Bb Db' = C' - A' P^-1 Cb',   Db Db' = L_0 - Cb P^-1 Cb'

        In coordinates where P = I the rows of [A B] are orthonormal; rows [E F] complete them to an orthogonal matrix,
        [x(t+1); wb] = [A B; E F] [x(t); w], whose inverse is its transpose: Bb = E', Db = C E' + D F', no square root
        of a difference. Of all E, F the one where F is symmetric and positive is taken. So reverse(reverse(m)) has the
        A, C and P of m and its B and D as well where A is invertible (else B and D up to one orthogonal matrix on the
        right: [B; D] [B; D]' is always that of m), the covariances L_h become their transposes, the poles stay.
        Refused if unstable, or uncontrollable as far as cond(P) above 1e8 (see `whitened`).
        Source: Lindquist and Picci 1979, SIAM J. Control and Optimization 17, 365-389.
        """
        n = self.A.shape[0]
        _conditioned(
            self.stationary, "the backward model", "the system is uncontrollable: P is singular; `whitened` first"
        )
        T = np.linalg.cholesky(self.stationary)
        rows = np.linalg.solve(T, np.concatenate((self.A @ T, self.B), 1))
        _, _, basis = np.linalg.svd(rows)
        E, F = basis[n:, :n], basis[n:, n:]
        left, _, right = np.linalg.svd(F)
        E, F = (right.T @ left.T) @ E, (right.T @ left.T) @ F
        Cb = self.C @ self.stationary @ self.A.T + self.D @ self.B.T
        return LTI(self.A.T, np.linalg.solve(T.T, E.T), Cb, self.C @ T @ E.T + self.D @ F.T)

    def to_layer(self, *, window: int | None = None, tolerance: float = 1e-9, hidden_size: int | None = None) -> Mixer:
        """A layer that is this system from input to output: `bmojo.realize.layer.to_layer`."""
        from bmojo.realize.layer import to_layer  # needs torch

        return to_layer(self, window=window, tolerance=tolerance, hidden_size=hidden_size)

    def _stable(self) -> LTI:
        if self.radius >= 1:
            raise RealizationError(
                f"the system is unstable: its largest pole has modulus {self.radius:.10g}, and a stationary process "
                "needs all below 1; scale A, or drop the modes that grow"
            )
        return self


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value`, if it is a whole number in least ... most."""
    if not isinstance(value, int | np.integer) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"in {least} ... {most}"
        raise RealizationError(f"{name} must be a whole number {span}, got {value!r}")
    return int(value)


def numbers(name: str, value: Any) -> Array:
    """`value` as a float64 array of its own; refused unless real, finite, and small enough to be squared."""
    array = real(name, value)
    if not np.isfinite(array).all():
        raise RealizationError(f"{name} must be finite, got nan or inf")
    if np.abs(array).max(initial=0) > LARGEST:
        raise RealizationError(f"{name} must be at most {LARGEST:g}, got {np.abs(array).max():.3g}; take other units")
    return array


def real(name: str, value: Any) -> Array:
    """`value` as a float64 array of its own, with nan and inf as they are."""
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise TypeError("they are complex")
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: of tensors that have a gradient
        raise RealizationError(f"{name} must be real numbers: {error}") from error


def _matrix(name: str, value: Any) -> Array:
    """The same as a read-only matrix."""
    matrix = numbers(name, value)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise RealizationError(f"{name} must be a matrix with rows and columns, got shape {list(matrix.shape)}")
    matrix.flags.writeable = False
    return matrix


def _symmetric(P: Array) -> Array:
    return (P + P.T) / 2


def _root(P: Array) -> Array:
    """S with S S' = P for P >= 0 up to rounding."""
    values, vectors = np.linalg.eigh(P)
    return vectors * np.sqrt(np.maximum(values, 0))


def _cholesky(R: Array, what: str) -> Array:
    """The lower Cholesky factors of R [..., p, p]."""
    try:
        return np.linalg.cholesky(R)
    except np.linalg.LinAlgError:
        raise RealizationError(
            f"{what} must be positive definite: some combination of the outputs is predicted without error, "
            "so the density of a sample is not finite; drop it, or add noise to the outputs (D)"
        ) from None


def _conditioned(T: Array, what: str, why: str = "another choice of coordinates may do") -> None:
    values = np.linalg.svd(T, compute_uv=False)
    _well(values[0], values[-1], what, why)


def _well(largest: float, smallest: float, what: str, why: str) -> None:
    """Refuses `what` if largest / smallest, its condition number, is above 1e8."""
    condition = largest / smallest if smallest > 0 else np.inf
    if condition > MAX_CONDITION:
        raise RealizationError(f"{what}: condition number {condition:.2g} is above {MAX_CONDITION:.0e}: {why}")


def _lyapunov(A: Array, Q: Array) -> Array:
    """P = sum_j A^j Q A'^j of a stable A, by doubling: 2^k terms in k steps, all of them positive."""
    P = Q
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(64):
            term = A @ P @ A.T
            P, A = _symmetric(P + term), A @ A
            if np.abs(term).max() <= 1e-17 * np.abs(P).max():
                break
    if not np.isfinite(P).all():
        raise RealizationError(
            "the stationary covariance is above what float64 holds; take other units, or coordinates"
        )
    return P


def _run(A: Array, u: Array, x: Array) -> Array:
    """x(t+1) = A x(t) + u(t) from x: the states before each of u [T, ..., n]."""
    states = np.empty_like(u)
    for t in range(len(u)):
        states[t] = x
        x = x @ A.T + u[t]
    return states
