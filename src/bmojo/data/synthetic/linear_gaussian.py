"""Linear-Gaussian sources: the quantised output of a fresh random stable system in every sequence.

    x_{t+1} = A x_t + w_t,    y_t = C x_t + v_t,    w ~ N(0, Q),  v ~ N(0, s),    var y = 1

A system has 2, 3 or 4 states: pairs of conjugate poles, uniform in the ring from `inner` to `radius` of the unit disk,
and a real one, on either side of it, where the number is odd. Q = B B', and B and C are of independent normal entries;
s, the white share of the variance of y, is uniform up to `noise`. x_1 is stationary. `predictions` is the Kalman filter
of the true system: a bound that no predictor reaches which does not know the system.

Token ids: `bins` bins over +-`span` standard deviations, the outer ones open; then the start, which stands first. The
label of a token is the bin behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bmojo.data.synthetic.task import Batch, Task, next_symbols
from bmojo.universal.autoregression import bin_shares

STATES = 4  # of the largest system; smaller ones have zeros there
_erfc = np.frompyfunc(math.erfc, 1, 1)


class Systems(NamedTuple):
    """The matrices of each row, and the covariance of the stationary state, P = A P A' + Q."""

    A: np.ndarray  # [rows, 4, 4]
    Q: np.ndarray  # [rows, 4, 4]
    C: np.ndarray  # [rows, 4]
    s: np.ndarray  # [rows]
    P: np.ndarray  # [rows, 4, 4]


@dataclass(frozen=True, kw_only=True)
class LinearGaussian(Task):
    length: int = 128
    bins: int = 32
    span: float = 4.0
    inner: float = 0.8
    radius: float = 0.98
    noise: float = 0.1

    def check(self) -> None:
        self.require(self.bins >= 2, f"bins must be at least 2, got {self.bins}")
        self.require(0 < self.span < math.inf, f"span must be above 0, got {self.span}")
        self.require(0 <= self.radius < 1, f"radius must be at least 0 and below 1, got {self.radius}")
        self.require(
            0 <= self.inner <= self.radius, f"inner must be from 0 to radius ({self.radius}), got {self.inner}"
        )
        self.require(0 < self.noise < 1, f"noise must be above 0 and below 1, got {self.noise}")

    @property
    def vocab_size(self) -> int:
        return self.bins + 1

    @property
    def chance(self) -> float:
        return 1 / self.bins

    @property
    def edges(self) -> np.ndarray:
        """[bins - 1]: what parts the bins."""
        return np.linspace(-self.span, self.span, self.bins + 1)[1:-1]

    @property
    def centres(self) -> np.ndarray:
        """[bins]: the middles of the bins, the outer ones as wide as the others."""
        width = 2 * self.span / self.bins
        return -self.span + width * (np.arange(self.bins) + 0.5)

    def systems(self, number: int, rows: int) -> Systems:
        """The sources of a batch."""
        return self._systems(self.generator(number), rows)

    def outputs(self, number: int, rows: int) -> np.ndarray:
        """[rows, length] float64: y before it is put in bins."""
        draw = self.generator(number)
        A, Q, C, s, P = self._systems(draw, rows)
        drive, white = _root(Q), np.sqrt(s)[:, None] * draw.standard_normal((rows, self.length))
        x = _apply(_root(P), draw.standard_normal((rows, STATES)))
        y = np.empty((rows, self.length))
        for t, w in enumerate(draw.standard_normal((self.length, rows, STATES))):
            y[:, t] = (C * x).sum(1) + white[:, t]
            x = _apply(A, x) + _apply(drive, w)
        return y

    def batch(self, number: int, rows: int) -> Batch:
        """Every next bin is asked; `distance` is that to the start."""
        return next_symbols(np.searchsorted(self.edges, self.outputs(number, rows)), start=self.bins)

    def predictions(self, number: int, rows: int, quantised: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [rows, length] of y_t given all y before it, by the Kalman filter of the true
        system. `quantised`: given their bins alone, as centres with the variance width^2 / 12 of the error added to
        that of the output (an approximation: the error is not Gaussian)."""
        A, Q, C, s, P = self.systems(number, rows)
        y, error = self.outputs(number, rows), 0.0
        if quantised:
            y, error = self.centres[np.searchsorted(self.edges, y)], (2 * self.span / self.bins) ** 2 / 12
        mean, deviation, x = np.empty_like(y), np.empty_like(y), np.zeros((rows, STATES))
        for t in range(self.length):
            cross = _apply(P, C)
            variance = (C * cross).sum(1) + s
            mean[:, t], deviation[:, t] = (C * x).sum(1), np.sqrt(variance)
            gain = cross / (variance + error)[:, None]
            x = _apply(A, x + gain * (y[:, t] - mean[:, t])[:, None])
            P = A @ (P - gain[:, :, None] * cross[:, None]) @ A.swapaxes(1, 2) + Q
        return mean, deviation

    def probabilities(self, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """[..., bins] float64: the bins' shares of N(mean, deviation^2), each to full relative precision."""
        edges = (self.edges - mean[..., None]) / deviation[..., None] / math.sqrt(2)
        return bin_shares(edges, lambda x: _erfc(-x)).astype(np.float64) / 2

    def _systems(self, draw: np.random.Generator, rows: int) -> Systems:
        states = draw.integers(2, STATES + 1, rows)
        has = np.arange(STATES) < states[:, None]
        least, most = self.inner**2, self.radius**2
        modulus, angle = np.sqrt(least + (most - least) * draw.random((rows, 2))), np.pi * draw.random((rows, 2))
        A = np.zeros((rows, STATES, STATES))
        for pair in (0, 1):
            i, j = 2 * pair, 2 * pair + 1
            A[:, i, i] = A[:, j, j] = modulus[:, pair] * np.cos(angle[:, pair])
            A[:, i, j] = modulus[:, pair] * np.sin(angle[:, pair])
            A[:, j, i] = -A[:, i, j]
        A[:, 2, 2] = np.where(states == 3, modulus[:, 1] * np.where(angle[:, 1] < np.pi / 2, 1, -1), A[:, 2, 2])
        A *= has[:, :, None] & has[:, None]
        B = draw.standard_normal((rows, STATES, STATES)) * has[:, :, None]
        C = draw.standard_normal((rows, STATES)) * has
        s = self.noise * draw.random(rows)
        kron = np.einsum("rij,rkl->rikjl", A, A).reshape(rows, STATES**2, STATES**2)
        Q = B @ B.swapaxes(1, 2)
        P = np.linalg.solve(np.eye(STATES**2) - kron, Q.reshape(rows, -1, 1)).reshape(A.shape)
        C *= np.sqrt((1 - s) / np.einsum("ri,rij,rj->r", C, P, C))[:, None]
        return Systems(A, Q, C, s, P)


def _apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum("rij,rj->ri", matrices, vectors)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R R' = covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))[:, None]
