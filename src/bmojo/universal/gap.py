"""How far a model's prediction in context is from the best there is, in bits.

    solomonoff_gap(InContext(model), table)                        exact: every string, weighted by M_norm
    ctw_gap(InContext(model), task, EVALUATION, rows=512)          sources: context trees
    kalman_gap(InContext(model, range(32), start=32), task, EVALUATION, rows=512)

A predictor is any object with `probabilities(x)`: bits x uint8 [batch, time] -> P(x_t = 1 | x_<t) float64 [batch, time]
(`KT`, `CTW`), or with `distribution(x)`: symbols x [batch, time] -> P(x_t = s | x_<t) [batch, time, symbols].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bmojo.errors import UniversalError
from bmojo.universal.ctw import CTW
from bmojo.universal.table import SolomonoffTable

Array = NDArray[np.float64]


class BitSource(Protocol):
    """What is asked of the task "markov_tree"."""

    def bits(self, number: int, rows: int) -> tuple[NDArray[np.uint8], Array]: ...


class BinSource(Protocol):
    """What is asked of the task "linear_gaussian"."""

    def batch(self, number: int, rows: int) -> dict[str, NDArray[Any]]: ...

    def predictions(self, number: int, rows: int) -> tuple[Array, Array]: ...

    def probabilities(self, mean: Array, deviation: Array) -> Array: ...


@dataclass(frozen=True)
class Gap:
    """Bits that a model needs more than its reference.

    `positions` [n] is the mean at each position, `ci95` [n] half the width of its 95 % interval over the sources,
    `reference` [n] what the reference itself needs; `totals` [sources] is the gap on the sequence of each source. Where
    the expectation is exact there is no interval, and one total.
    """

    positions: Array
    ci95: Array
    reference: Array
    totals: Array

    @property
    def total(self) -> float:
        """Of a whole sequence."""
        return float(self.positions.sum())

    @property
    def total_ci95(self) -> float:
        """Half the width of the 95 % interval of `total`."""
        return 0.0 if len(self.totals) == 1 else float(_half_width(self.totals))

    @property
    def entropy(self) -> float:
        """Of a whole sequence, as the reference has it."""
        return float(self.reference.sum())


class TreeGap(NamedTuple):
    ctw: Gap
    source: Gap


class InContext:
    """A language model as a predictor of symbols: its logits at their token ids, renormalised.

    `model` is a BMojoLM or any module whose call on int64 tokens [batch, time] gives an object with `logits`, or the
    logits (first, if there is more). Symbol i is token `symbols[i]`; the token `start` stands before the first.
    Raises UniversalError for symbols that are not different, or tokens that are none of the model's.
    """

    def __init__(self, model: Any, symbols: Sequence[int] = (0, 1), start: int = 2, batch: int = 1024) -> None:
        vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
        for token in (*symbols, start):
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                most = "" if vocab_size is None else f" and below the vocabulary's {vocab_size}"
                raise UniversalError(
                    f"tokens of symbols and of the start must be at least 0{most}, got {token}; "
                    "name the ids that this model was trained with"
                )
        if len(symbols) < 2 or len({*symbols}) < len(symbols):
            raise UniversalError(f"symbols must be two or more different tokens, got {list(symbols)}")
        self.model, self.symbols, self.start, self.batch = model, np.asarray(symbols), start, batch

    def distribution(self, x: NDArray[Any]) -> Array:
        """P(x_t = s | x_<t) [batch, time, symbols] of symbols x [batch, time]."""
        import torch

        if x.size and x.max() >= len(self.symbols):
            raise UniversalError(
                f"sequences of symbol {x.max()} need {x.max() + 1} symbols or more, got {len(self.symbols)}; "
                "name the tokens of all of them: InContext(model, symbols=..., start=...)"
            )
        tokens = np.concatenate([np.full((len(x), 1), self.start), self.symbols[x[:, :-1]]], axis=1)
        device, training = next(self.model.parameters()).device, self.model.training
        self.model.eval()
        parts = []
        with torch.no_grad():
            for rows in torch.from_numpy(tokens).split(self.batch):
                answer = self.model(rows.to(device))
                logits: Any = answer[0] if isinstance(answer, tuple) else getattr(answer, "logits", answer)
                parts.append(logits[..., torch.from_numpy(self.symbols).to(device)].double().softmax(-1).cpu().numpy())
        self.model.train(training)
        return np.concatenate(parts)

    def probabilities(self, x: NDArray[np.uint8]) -> Array:
        """P(x_t = 1 | x_<t) [batch, time], if there are two symbols."""
        return self.distribution(x)[..., 1]


class Uniform:
    """Every bit with probability 1/2."""

    def probabilities(self, x: NDArray[np.uint8]) -> Array:
        return np.full(x.shape, 0.5)


def solomonoff_gap(model: Any, table: SolomonoffTable) -> Gap:
    """sum_t E KL(M_norm(. | x_<t) || q(. | x_<t)), exact: the sum over all strings that M gives any mass.

    M_norm(b | s) = M(sb) / (M(s0) + M(s1)). Where no program of the table goes on, neither has mass, and M_norm is
    uniform: such a string costs its reference a bit a position and a model the more, the less uniform it is there.
    The model reads each prefix once, in as few strings as hold them all.
    """
    n, weights = table.n_bits, table.measures
    visited = [np.flatnonzero(weight) for weight in weights[:n]]
    # a string is a number, its first bit highest; one that reads a prefix goes on with zeros
    strings = np.unique(np.concatenate([prefix << (n - t) for t, prefix in enumerate(visited)]))
    q = distribution(model, (strings[:, None] >> np.arange(n - 1, -1, -1) & 1).astype(np.uint8), 2)
    positions, reference = np.zeros(n), np.zeros(n)
    for t, prefix in enumerate(visited):
        p, weight = _both(table.predictions[t][prefix]), weights[t][prefix]
        entropy = _cross_entropy(p, p)
        reference[t] = weight @ entropy
        positions[t] = weight @ (_cross_entropy(p, q[np.searchsorted(strings, prefix << (n - t)), t]) - entropy)
    return Gap(positions, np.zeros(n), reference, positions.sum(keepdims=True))


def ctw_gap(model: Any, source: BitSource, number: int, rows: int, depth: int = 10) -> TreeGap:
    """E log2 p(x_t | x_<t) - log2 q(x_t | x_<t) over `rows` sources, with p that of CTW, and that of the true source.

    The expectation over x_t is taken exactly, given the source and the past. On trees from CTW's own prior (the task
    with split = 1/2 and this depth) CTW is the exact Bayes predictor, and `ctw` is at least zero in the mean.
    """
    _require_sources(rows)
    x, ones = source.bits(number, rows)
    true, q = _both(ones), distribution(model, x, 2)
    ctw = _both(CTW(depth).probabilities(x))
    return TreeGap(_sampled(true, ctw, q), _sampled(true, true, q))


def kalman_gap(model: Any, source: BinSource, number: int, rows: int) -> Gap:
    """E KL(p(. | y_<t) || q(. | x_<t)) over `rows` systems: p gives a bin its share of the prediction of the Kalman
    filter of the true system from the outputs themselves, q has the bins x of those outputs and does not know the
    system. At least zero, and for whoever sees bins alone a little above it (see `predictions`)."""
    _require_sources(rows)
    x = source.batch(number, rows)["labels"]
    p = source.probabilities(*source.predictions(number, rows))
    return _sampled(p, p, distribution(model, x, p.shape[-1]))


def distribution(model: Any, x: NDArray[Any], symbols: int) -> Array:
    """P(x_t = s | x_<t) [batch, time, symbols] by a predictor of either kind; UniversalError if it is of others."""
    if not hasattr(model, "distribution") and not hasattr(model, "probabilities"):
        raise UniversalError(
            f"a predictor has `probabilities` or `distribution`, {type(model).__name__} has neither; a language model "
            "becomes one with the tokens of its symbols and of its start: InContext(model, symbols=(0, 1), start=2)"
        )
    q = model.distribution(x) if hasattr(model, "distribution") else _both(model.probabilities(x))
    if q.shape != (*x.shape, symbols):
        raise UniversalError(
            f"a predictor of {symbols} symbols must give probabilities {[*x.shape, symbols]}, got {[*q.shape]}; "
            "use one of this source's symbols"
        )
    return q


def _require_sources(rows: int) -> None:
    if rows < 2:
        raise UniversalError(f"rows must be at least 2, as the interval is one over the sources, got {rows}")


def _both(ones: Array) -> Array:
    return np.stack([1 - ones, ones], axis=-1)


def _cross_entropy(p: Array, q: Array) -> Array:
    """-sum_s p_s log2 q_s, infinite if what comes can't by q; what never comes costs nothing."""
    with np.errstate(divide="ignore"):
        return -(p * np.log2(np.where(p > 0, q, 1))).sum(-1)


def _sampled(true: Array, reference: Array, q: Array) -> Gap:
    """What q costs more than `reference`, all [sources, time, symbols], in the mean over `true`."""
    cost = _cross_entropy(true, reference)
    gaps = _cross_entropy(true, q) - cost
    return Gap(gaps.mean(0), _half_width(gaps), cost.mean(0), gaps.sum(1))


def _half_width(values: Array) -> Array:
    """Of the 95 % interval of the mean over the first axis."""
    return 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
