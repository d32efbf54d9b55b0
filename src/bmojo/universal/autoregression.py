"""Bayesian autoregression: a tractable predictor of linear-Gaussian sources that does not know the system."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmojo.files import optional_module


class AR:
    """The Bayes mixture of autoregressions of order 0 to `order`, on outputs that are seen as bins.

    y_t = a_1 y_{t-1} + ... + a_p y_{t-p} + e_t,    e ~ N(0, v),   a | v ~ N(0, v I),   1/v ~ Gamma(shape 2, rate 1)

    with the middles of the bins as y, and zeros before the first. Given its past an order predicts y_t by Student's t
    with its recursive least-squares estimate in the middle, and a bin by its share of that; the orders, alike at first,
    weigh by what probability they gave to the bins that came. `edges` [bins - 1] part the bins.
    """

    def __init__(self, edges: ArrayLike, centres: ArrayLike, order: int = 8) -> None:
        self.edges, self.centres, self.order = np.asarray(edges), np.asarray(centres), order

    def distribution(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """P(x_t = b | x_<t) [batch, time, bins] of bins x [batch, time]."""
        y = self.centres[x]
        orders = [self._order(p, x, y) for p in range(self.order + 1)]
        came = [np.take_along_axis(part, x[..., None], -1)[..., 0] for part in orders]
        weights = np.cumsum(np.log(came), axis=-1)  # [order, batch, time], after each bin
        weights = np.concatenate([np.zeros_like(weights[..., :1]), weights[..., :-1]], -1)
        weights = np.exp(weights - weights.max(0))
        return np.einsum("pbt,pbts->bts", weights / weights.sum(0), np.stack(orders))

    def _order(self, p: int, x: NDArray[Any], y: NDArray[np.float64]) -> NDArray[np.float64]:
        rows, steps = y.shape
        a, V = np.zeros((rows, p)), np.tile(np.eye(p), (rows, 1, 1))
        shape, rate = 2.0, np.ones(rows)
        past = np.concatenate([np.zeros((rows, p)), y], 1)
        result = np.empty((rows, steps, len(self.centres)))
        for t in range(steps):
            z = past[:, t : t + p][:, ::-1]
            gain = np.einsum("rij,rj->ri", V, z)
            spread, mean = 1 + (gain * z).sum(1), (a * z).sum(1)
            result[:, t] = self._shares(mean, np.sqrt(rate / shape * spread), 2 * shape)
            error = y[:, t] - mean
            a = a + gain * (error / spread)[:, None]
            V = V - gain[:, :, None] * gain[:, None] / spread[:, None, None]
            shape, rate = shape + 0.5, rate + error**2 / (2 * spread)
        return result

    def _shares(self, mean: NDArray, scale: NDArray, freedom: float) -> NDArray[np.float64]:
        stdtr = optional_module("scipy.special", "Student's t", "realize").stdtr
        return bin_shares((self.edges - mean[:, None]) / scale[:, None], partial(stdtr, freedom))


def bin_shares(edges: NDArray[np.float64], distribution: Callable) -> NDArray[Any]:
    """The bins' shares [..., bins] of a law that is symmetric about 0, each to full relative precision.

    edges [..., bins - 1] part the bins, of which the outer ones are open; `distribution(x)` is the law's P(X <= x).
    """
    end = np.full_like(edges[..., :1], np.inf)
    low, high = np.concatenate([-end, edges], -1), np.concatenate([edges, end], -1)
    swap = low > 0  # the tail in which the difference loses nothing
    low, high = np.where(swap, -high, low), np.where(swap, -low, high)
    return distribution(high) - distribution(low)
