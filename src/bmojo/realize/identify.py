"""Systems from data: from Markov parameters (Ho and Kalman) and from a series (canonical variate analysis)."""

from __future__ import annotations

import numpy as np

from bmojo.errors import RealizationError
from bmojo.realize.lti import LTI, numbers, whole

Array = np.ndarray


def ho_kalman(h: Array, n: int | None = None) -> LTI:
    """The system of n states whose Markov parameters are h [k + 1, p, m]: h_0 = D, h_j = C A^(j-1) B.

    The Hankel matrix [h_(i+j-1)], of ceil(k/2) block rows, is O R, observability times reachability; from its SVD the
    balanced factors of rank n, and A from O shifted by a block. n=None takes its numerical rank (1e-10 of the largest
    singular value). Of covariances, ho_kalman(L) is the system (A, G, C, L_0) of which all realizations of the process
    are made. Refused: fewer than 3 parameters, n above the rank or above what the matrix can hold.
    Source: Ho and Kalman 1966; Juang and Pappa 1985 (ERA).
    """
    h = numbers("the Markov parameters", h)
    if h.ndim != 3 or len(h) < 3 or 0 in h.shape:
        raise RealizationError(f"Markov parameters must be [k + 1, p, m] with k >= 2, got shape {list(h.shape)}")
    k, p, m = len(h) - 1, *h.shape[1:]
    rows = (k + 1) // 2
    columns = k + 1 - rows
    hankel = np.block([[h[1 + i + j] for j in range(columns)] for i in range(rows)])
    U, s, V = np.linalg.svd(hankel, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    n = rank if n is None else whole("n", n, 0)
    most = min(rank, (rows - 1) * p)
    if not 1 <= n <= most:
        raise RealizationError(
            f"{k} Markov parameters of rank {rank} determine 1 ... {most} states, got n = {n}; "
            "give more of them, or ask for fewer states"
        )
    scale = np.sqrt(s[:n])
    seen, reached = U[:, :n] * scale, scale[:, None] * V[:n]
    A = np.linalg.lstsq(seen[:-p], seen[p:], rcond=None)[0]
    return LTI(A, reached[:, :m], seen[:p], h[0])


def cva(y: Array, n: int | None = None, *, lags: int | None = None) -> LTI:
    """The innovations form of n states that a series y [N, p] is explained by: canonical variate analysis.

    With past [y(t-1) ... y(t-lags)] and future [y(t) ... y(t+lags-1)] of covariances S_pp = L_p L_p', S_ff = L_f L_f'
    and S_fp, the canonical correlations s are the singular values of L_f^-1 S_fp L_p^-T = U s V', and the state is
    x(t) = s^(1/2) V' L_p^-1 past. C by regression of y(t) on x(t), with errors e(t) of covariance R_e; A and K by
    regression of x(t+1) on (x(t), e(t)). The mean of y is taken off: the model is that of y - mean.

    lags=None: twice the order of the autoregression with the least AIC (Bauer 2005), at most what N allows.
    n=None: the n with the least AIC, log det R_e(n) + 4 n p / N (2 n p parameters): made to predict, not to find "the"
    order; modes too weak for N are left out.

    Refused: fewer samples than four a number of past and future; constant or linearly dependent outputs; a series that
    its past predicts exactly; and an answer that is unstable, as of series that drift or grow.
    Source: Larimore 1983; Lindquist and Picci 2015, chapter 13.
    """
    y, spread = _standardised(y)
    N, p = y.shape
    most = (N + 1) // (8 * p + 2)  # the largest lags with N - 2 lags + 1 >= 4 * (2 lags p)
    asked = 1 if lags is None else whole("lags", lags, 1)
    if asked > most:
        raise RealizationError(
            f"too few samples: {asked} lags of {p} outputs need {(8 * p + 2) * asked - 1}, four a number of past and "
            f"future, got {N}; " + (f"take lags <= {most}" if most else "give more samples, or fewer outputs")
        )
    if n is not None:
        whole("n, at most lags * outputs,", n, 1, (most if lags is None else lags) * p)
    if lags is None:
        lags = max(_best_lags(y, most), -(-(n or 1) // p))
    rows = N - 2 * lags + 1
    window = np.lib.stride_tricks.sliding_window_view(y, 2 * lags, axis=0).transpose(0, 2, 1)  # [rows, 2 lags, p]
    past, future = window[:, lags - 1 :: -1].reshape(rows, -1), window[:, lags:].reshape(rows, -1)
    L_p, L_f = (_factor(part.T @ part / rows) for part in (past, future))
    _, s, V = np.linalg.svd(np.linalg.solve(L_f, np.linalg.solve(L_p, past.T @ future / rows).T))
    variates = np.linalg.solve(L_p, past.T).T @ V.T  # [rows, lags p]: uncorrelated, of variance 1
    if n is None:
        n = _best_order(window[:, lags], variates)
    x = variates[:, :n] * np.sqrt(s[:n])
    C, e = _regress(window[:, lags], x)
    AK, _ = _regress(x[1:], np.concatenate((x, e), 1)[:-1])
    A, K = AK[:, :n], AK[:, n:]
    model = LTI.from_innovations(A, K / spread, spread[:, None] * C, np.outer(spread, spread) * (e.T @ e) / rows)
    if model.radius >= 1:
        raise RealizationError(
            f"the identified system is unstable: its largest pole has modulus {model.radius:.6g}. The series drifts or "
            "grows, or is too short: take differences, remove the trend, ask for fewer states, or give more samples"
        )
    return model


def _standardised(y: Array) -> tuple[Array, Array]:
    """y less its mean, over its standard deviations; and these."""
    y = numbers("the series", y)
    if y.ndim != 2 or y.shape[0] < 2 or y.shape[1] < 1:
        raise RealizationError(f"a series must be [N, p], of 2 samples or more, got shape {list(y.shape)}")
    spread = y.std(0)
    constant = np.flatnonzero(spread <= 1e-12 * np.abs(y).max(0))
    if len(constant):
        raise RealizationError(f"outputs {constant.tolist()} are constant: there is nothing to predict; drop them")
    y = (y - y.mean(0)) / spread
    least = np.linalg.eigvalsh(y.T @ y / len(y))[0]
    if least < 1e-10:
        raise RealizationError(
            f"the outputs are linearly dependent (their correlations have eigenvalue {least:.1g}), or fewer samples "
            "than outputs: drop some"
        )
    return y, spread


def _regress(y: Array, x: Array) -> tuple[Array, Array]:
    """The coefficients M [of y, of x] of y = M x + error, by least squares; and the errors."""
    M = np.linalg.lstsq(x, y, rcond=None)[0].T
    return M, y - x @ M.T


def _factor(S: Array) -> Array:
    """The Cholesky factor of the covariance of past or future."""
    values = np.linalg.eigvalsh(S)
    if values[0] <= 1e-12 * values[-1]:
        raise RealizationError(
            "the series is predicted by its past without error, as a sum of sines is: there is no noise to identify; "
            "take fewer lags, or ho_kalman of its covariances"
        )
    return np.linalg.cholesky(S)


def _best_order(y: Array, variates: Array) -> int:
    """The number n of variates [rows, lags p] with the least AIC for the prediction of y [rows, p]."""
    rows, p = y.shape
    explained = y.T @ variates / rows
    errors = y.T @ y / rows - np.cumsum(np.einsum("in,jn->nij", explained, explained), 0)
    scores = np.linalg.slogdet(errors)[1] + 4 * p * np.arange(1, len(errors) + 1) / rows
    return 1 + int(np.argmin(scores))


def _best_lags(y: Array, most: int) -> int:
    """Twice the order k of the autoregression with the least log det R_k + 2 k p^2 / N, at most `most`.

    R_k, the covariance of the errors of predicting from k samples, is block k of the Cholesky factor of the covariance
    of k + 1 samples, squared: one factor gives all of them.
    """
    N, p = y.shape
    orders = max(1, min(most, round(4 * N ** (1 / 4))))
    L = [y[h:].T @ y[: N - h] / N for h in range(orders + 1)]
    joint = np.block([[L[i - j] if i >= j else L[j - i].T for j in range(orders + 1)] for i in range(orders + 1)])
    log_dets = 2 * np.log(np.diag(_factor(joint))).reshape(-1, p).sum(1)
    return int(np.clip(2 * np.argmin(log_dets + 2 * np.arange(orders + 1) * p**2 / N), 2, max(most, 1)))
