"""Context tree weighting: the Bayes mixture over all tree sources up to a depth, exact and in linear time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmojo.errors import DataError
from bmojo.universal.compiled import HAS_NUMBA, compiled
from bmojo.universal.kt import as_bits, log2_kt

MAX_DEPTH = 20
_CELLS = 1 << 22  # counts held at once when rows are taken together


class CTW:
    """Context tree weighting on bits, of a given depth.

    P_w(s) = P_kt(s) / 2 + P_w(0s) P_w(1s) / 2,   at the depth: P_w(s) = P_kt(s);   P(x) = P_w(root)

    where s is a context, the bits just before a bit, and P_kt(s) the KT probability of the bits that stand after s. It
    is the mixture over all context trees up to the depth, a tree with k leaves of which m are above the depth
    weighing 2^-(k - 1 + m). The bits before the first one are taken to be zeros, so that every bit has a full context.
    Source: Willems, Shtarkov and Tjalkens 1995. Depth 0 is KT.
    """

    def __init__(self, depth: int) -> None:
        if not 0 <= depth <= MAX_DEPTH:
            raise DataError(f"the depth of CTW must be 0 to {MAX_DEPTH}, as 2^depth contexts are held, got {depth}")
        self.depth = depth

    def log2_probability(self, x: ArrayLike) -> NDArray[np.float64]:
        """log2 P(x) [batch] of whole strings x [batch, time], from the counts: the definition, word for word."""
        rows = _batches(as_bits(x), 2 << self.depth)
        return np.concatenate([self._block(batch) for batch in rows])

    def probabilities(self, x: ArrayLike) -> NDArray[np.float64]:
        """P(x_t = 1 | x_<t) [batch, time] float64 of bits x [batch, time].

        From the leaf to the root of the contexts of x_t: p = (r kt + p') / (r + 1), with p' of the child and the
        ratio r = P_kt(s) / (P_w(0s) P_w(1s)) of what both have made of the past. With numba a row at a time, without
        it step by step on all rows. Raises DataError unless x holds bits.
        """
        x = as_bits(x)
        if HAS_NUMBA:
            return compiled(_row_by_row)(x, self.depth)
        return np.concatenate([_step_by_step(batch, self.depth) for batch in _batches(x, 6 << self.depth)])

    def _block(self, x: NDArray[np.uint8]) -> NDArray[np.float64]:
        size, context = 1 << self.depth, _contexts(x, self.depth)
        cell = (np.arange(len(x))[:, None] * size + context) * 2 + x
        counts = np.bincount(cell.ravel(), minlength=len(x) * size * 2).reshape(len(x), size, 2)
        weighted = log2_kt(counts[..., 0], counts[..., 1])
        for depth in reversed(range(self.depth)):
            # a context is a number with the last bit lowest: its children differ in the next higher bit
            counts = counts.reshape(len(x), 2, 1 << depth, 2).sum(axis=1)
            children = weighted.reshape(len(x), 2, 1 << depth).sum(axis=1)
            weighted = np.logaddexp2(log2_kt(counts[..., 0], counts[..., 1]), children) - 1
        return weighted[:, 0]


def _batches(x: NDArray, cells: int) -> list[NDArray]:
    """The rows in as many batches as keep `cells` a row small."""
    return np.array_split(x, max(1, -(-len(x) * cells // _CELLS)))


def _contexts(x: NDArray[np.uint8], depth: int) -> NDArray[np.int64]:
    """The `depth` bits before each bit as a number, the last one lowest; zeros before the first."""
    context = np.zeros(x.shape, np.int64)
    for distance in range(1, min(depth, x.shape[1] - 1) + 1):
        context[:, distance:] |= x[:, :-distance].astype(np.int64) << (distance - 1)
    return context


def _step_by_step(x: NDArray[np.uint8], depth: int) -> NDArray[np.float64]:
    batch = np.arange(len(x))
    counts = np.zeros((len(x), 2 << depth, 2))
    log_ratio = np.zeros((len(x), 2 << depth))
    result = np.empty(x.shape)
    for t, context in enumerate(_contexts(x, depth).T):
        bit = x[:, t]
        for level in range(depth, -1, -1):
            node = (1 << level) + context % (1 << level)
            seen = counts[batch, node]
            kt = (seen + 0.5) / (seen.sum(axis=1, keepdims=True) + 1)
            counts[batch, node, bit] += 1
            if level == depth:
                p = kt
                continue
            r = log_ratio[batch, node]
            own, child = np.exp(np.minimum(r, 0))[:, None], np.exp(np.minimum(-r, 0))[:, None]
            log_ratio[batch, node] += np.log(kt[batch, bit] / p[batch, bit])
            p = (own * kt + child * p) / (own + child)
        result[:, t] = p[:, 1]
    return result


def _row_by_row(x: NDArray[np.uint8], depth: int) -> NDArray[np.float64]:  # for numba
    rows, steps = x.shape
    result = np.empty((rows, steps))
    counts = np.empty((2 << depth, 2), np.int64)
    log_ratio = np.empty(2 << depth)
    for row in range(rows):
        counts[:], log_ratio[:] = 0, 0.0
        context = 0
        for t in range(steps):
            bit = x[row, t]
            p = 0.0  # of a one
            for level in range(depth, -1, -1):
                node = (1 << level) + context % (1 << level)
                kt = (counts[node, 1] + 0.5) / (counts[node, 0] + counts[node, 1] + 1)
                counts[node, bit] += 1
                if level == depth:
                    p = kt
                    continue
                r = log_ratio[node]
                own, child = np.exp(min(r, 0.0)), np.exp(min(-r, 0.0))
                log_ratio[node] += np.log(kt / p) if bit else np.log((1 - kt) / (1 - p))
                p = (own * kt + child * p) / (own + child)
            result[row, t] = p
            context = (context << 1 | bit) % (1 << depth)
    return result
