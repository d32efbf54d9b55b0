"""The estimator of Krichevsky and Trofimov: the Bayes mixture over all biased coins, with Jeffreys' prior."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmojo.errors import DataError


def log2_kt(zeros: ArrayLike, ones: ArrayLike) -> NDArray[np.float64]:
    """log2 of the KT probability of any one string with that many zeros and ones, elementwise.

    P(a zeros, b ones) = prod_{i<a} (i + 1/2) prod_{j<b} (j + 1/2) / (a + b)!
    """
    zeros, ones = np.asarray(zeros), np.asarray(ones)
    number = np.arange(int((zeros + ones).max(initial=0)))
    halves = np.concatenate([[0.0], np.cumsum(np.log2(number + 0.5))])
    factorials = np.concatenate([[0.0], np.cumsum(np.log2(number + 1.0))])
    return halves[zeros] + halves[ones] - factorials[zeros + ones]


class KT:
    """P(x_t = 1 | x_<t) = (ones + 1/2) / (t + 1), with the ones of x_<t. Source: Krichevsky and Trofimov 1981."""

    def probabilities(self, x: ArrayLike) -> NDArray[np.float64]:
        """x: bits [batch, time], uint8. Returns P(x_t = 1 | x_<t) [batch, time]. Raises DataError for other x."""
        x = as_bits(x)
        ones = np.cumsum(x, axis=1, dtype=np.int64) - x
        return (ones + 0.5) / (np.arange(x.shape[1]) + 1)

    def log2_probability(self, x: ArrayLike) -> NDArray[np.float64]:
        """log2 P(x) [batch] of whole strings, by the closed form."""
        x = as_bits(x)
        ones = x.sum(axis=1, dtype=np.int64)
        return log2_kt(x.shape[1] - ones, ones)


def as_bits(x: ArrayLike) -> NDArray[np.uint8]:
    """x as uint8 [batch, time]; DataError unless it is an array of that shape that holds 0 and 1 only."""
    bits = np.asarray(x)
    if bits.ndim != 2:
        raise DataError(f"bits must have the shape [batch, time], got {list(bits.shape)}; a single string is x[None]")
    wrong = bits[(bits != 0) & (bits != 1)]
    if wrong.size:
        raise DataError(f"bits must be 0 or 1, got {wrong[0]}")
    return np.ascontiguousarray(bits, dtype=np.uint8)
