"""Are prediction errors white? Portmanteau tests that do not cry wolf when their variance depends on the past.

    found = whiteness(e, 20)                          # e [samples, channels], 20 lags
    found.total_p[-1], found.failing                  # of all lags together; which of them fail
    whiteness(e, 20, null="martingale")               # of text, or of anything with a changing variance

The errors of an optimal predictor are unpredictable from their own past: E[e_t | e_{t-1}, e_{t-2}, ...] = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bmojo.errors import ConfigError, DataError, nearest
from bmojo.files import optional_module
from bmojo.realize.lti import real

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator], Floats]

NULLS = ("table", "martingale", "permutation")
AT_ONCE = 4096  # samples whose products are held at once
SINGULAR = 1e-10  # smallest eigenvalue of a correlation matrix that is still one of distinct channels


@dataclass(frozen=True)
class Whiteness:
    """What `whiteness` found, at m lags of p channels. Sums run over the lags given, up to this one.

    each, each_p            [m]     statistic of one lag, and its p-value
    each_mean               [m]     what the statistic of one lag is on average under the hypothesis
    total, total_df, total_p [m]    multivariate portmanteau; df and p are nan where no degree of freedom is left
    ljung_box, ljung_box_p  [m, p]  of each channel by itself
    failing                         lags that fail after the correction for their number
    """

    lags: NDArray[np.int64]
    each: Floats
    each_p: Floats
    each_mean: Floats
    total: Floats
    total_df: Floats
    total_p: Floats
    ljung_box: Floats
    ljung_box_p: Floats
    failing: tuple[int, ...]


def whiteness(
    e: Floats,
    lags: int | Sequence[int],
    fitted: int = 0,
    *,
    null: str | Draw = "table",
    correction: str = "holm",
    level: float = 0.05,
    samples: int = 499,
    block: int = 1,
    seed: int = 0,
) -> Whiteness:
    """Tests of e [T, p] (float64) against no correlation at `lags`: 1 ... lags, or those given.

        C_k = 1/T sum_t (e_t - m)(e_{t-k} - m)'
        one lag         q_k  = T^2 / (T - k) tr(C_k' C_0^-1 C_k C_0^-1)            chi2(p^2)
        multivariate    Q    = sum_k q_k                                            chi2(p^2 m - fitted)
        one channel     Q_i  = T (T + 2) sum_k r_k^2 / (T - k), r_k = C_k,ii / C_0,ii   chi2(m - fitted / p^2)

    fitted: parameters of the dynamics that were estimated from these very samples (p^2 k of a VAR(k), 2 n p of an
    innovations form with n states); each of the p^2 correlations gives up its share. q_k keeps all its degrees of
    freedom, so at small lags its test is then conservative.

    null: where p-values come from.
        table        the chi-square above: independent errors of constant distribution, many samples
        martingale   no more is assumed than E[e_t | past] = 0. The variance of language's errors depends on their past,
                     and the table then rejects perfect predictors. Draws sum_t w_t e_t e_{t-k}' with random signs w_t:
                     they have the covariances, between lags too, that such errors have. Correlation at one lag makes
                     the estimates at all others vary more (Bartlett), and then these fail as well; signs that stay the
                     same for `block` samples, a few times that lag, allow for it, and need T well above `block`.
        permutation  the samples in random order: independent errors of any distribution, few samples
        a function   of a generator, returning residuals [T, p] under the hypothesis: simulate the fitted model, fit it
                     again, return what is left. The right one where parameters were fitted to few samples.
    Drawn p-values are those of the gamma distribution with mean and variance of `samples` draws: that of a weighted sum
    of chi-squares, nearly, and finer than 1 / samples.

    correction: of m lags, 5 % fail by chance. `holm`: the chance that any of `failing` fails by chance is at most
    `level`; `bh` (Benjamini-Hochberg): of those in `failing`, at most that share is expected to.

    Raises RealizationError for what are no real numbers; DataError for too few samples, values that are not finite,
    constant or dependent channels; ConfigError for
    settings out of range, or `fitted` with a null that can't know of it.
    Sources: Ljung and Box 1978; Hosking 1980, JASA 75; Hall and Heyde 1980; Holm 1979; Benjamini and Hochberg 1995.
    """
    special = optional_module("scipy.special", "the test of whiteness", "realize")
    at = _lags(lags)
    e = _checked(e, at)
    count, channels = e.shape
    _check_settings(fitted, len(at) * channels**2, null, correction, level, samples, block)

    z, g = _whitened(e)
    each, box = _statistics(_correlations(z, at), g, at, count)
    total, summed = each.cumsum(), box.cumsum(0)
    df = channels**2 * np.arange(1.0, len(at) + 1) - fitted
    df[df <= 0] = np.nan
    if null == "table":
        each_p, each_mean = special.chdtrc(channels**2, each), np.full(len(at), float(channels**2))
        total_p, box_p = special.chdtrc(df, total), special.chdtrc(df[:, None] / channels**2, summed)
    else:
        drawn = list(_draws(e, z, g, at, null, samples, block, np.random.default_rng(seed)))
        some_each, some_box = (np.stack(parts) for parts in zip(*drawn, strict=True))

        def tail(value: Floats, draws: Floats) -> Floats:
            mean, variance = draws.mean(0), draws.var(0, ddof=1)
            return special.gammaincc(mean**2 / variance, value * mean / variance)

        each_p, each_mean = tail(each, some_each), some_each.mean(0)
        total_p = tail(total, some_each.cumsum(1))
        box_p = tail(summed, some_box.cumsum(1))
    failing = tuple(int(lag) for lag in at[rejected(each_p, level, correction)])
    return Whiteness(at, each, each_p, each_mean, total, df, total_p, summed, box_p, failing)


def rejected(p: Floats, level: float = 0.05, correction: str = "holm") -> NDArray[np.bool_]:
    """Which of the hypotheses with p-values [m] fall: by Holm's step down, or Benjamini and Hochberg's step up."""
    ranks = np.arange(1, len(p) + 1)
    order = np.argsort(p, kind="stable")
    if correction == "holm":
        count = int(np.argmax([*(p[order] > level / (len(p) - ranks + 1)), True]))
    else:
        count = max(ranks[p[order] <= level * ranks / len(p)], default=0)
    chosen = np.zeros(len(p), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def _correlations(z: Floats, lags: NDArray[np.int64]) -> Floats:
    """[m, p, p]: 1/T sum_t z_t z_{t-k}'."""
    return np.stack([z[lag:].T @ z[:-lag] for lag in lags]) / len(z)


def _whitened(e: Floats) -> tuple[Floats, Floats]:
    """z of e = m + z L', with 1/T sum z z' = 1; and the rows of L over their lengths, which give channels back."""
    centred = e - e.mean(0)
    root = np.linalg.cholesky(centred.T @ centred / len(e))
    return np.linalg.solve(root, centred.T).T, root / np.linalg.norm(root, axis=1, keepdims=True)


def _statistics(r: Floats, g: Floats, lags: NDArray[np.int64], count: int) -> tuple[Floats, Floats]:
    """Hosking's terms [..., m] and Ljung-Box's [..., m, p], of correlations r [..., m, p, p] of whitened errors."""
    own = np.einsum("ia,...ab,ib->...i", g, r, g)
    return count**2 / (count - lags) * (r**2).sum((-1, -2)), count * (count + 2) * own**2 / (count - lags)[:, None]


def _draws(
    e: Floats,
    z: Floats,
    g: Floats,
    lags: NDArray[np.int64],
    null: str | Draw,
    samples: int,
    block: int,
    random: np.random.Generator,
) -> Iterator[tuple[Floats, Floats]]:
    """`samples` times `_statistics` under the hypothesis."""
    if null == "martingale":
        for r in _signed(z, lags, samples, block, random):
            yield _statistics(r, g, lags, len(z))
        return
    for _ in range(samples):
        if callable(null):
            again = np.asarray(null(random), dtype=np.float64)
            if again.shape != e.shape:
                raise DataError(f"a draw of residuals must have the shape {e.shape} of the errors, got {again.shape}")
            drawn, back = _whitened(_checked(again, lags))
        else:
            drawn, back = random.permutation(z), g
        yield _statistics(_correlations(drawn, lags), back, lags, len(z))


def _signed(z: Floats, lags: NDArray[np.int64], samples: int, block: int, random: np.random.Generator) -> Floats:
    """[samples, m, p, p]: 1/T sum_t w_t z_t z_{t-k}' with random signs w_t, the same for all k and for `block` samples.
    In float32, summed up in float64: draws need no more."""
    count, channels = z.shape
    z = z.astype(np.float32)
    r = np.zeros((samples, len(lags), channels**2))
    step = -(-AT_ONCE // block) * block
    for start in range(0, count, step):
        stop = min(start + step, count)
        signs = 2 * random.integers(0, 2, (samples, step // block)).astype(np.float32) - 1
        signs = signs.repeat(block, axis=1)[:, : stop - start]
        for i, lag in enumerate(lags):
            first = max(start, int(lag))
            if first < stop:
                products = z[first:stop, :, None] * z[first - lag : stop - lag, None, :]
                r[:, i] += signs[:, first - start :] @ products.reshape(stop - first, -1)
    return r.reshape(samples, len(lags), channels, channels) / count


def _lags(lags: int | Sequence[int]) -> NDArray[np.int64]:
    given = np.arange(1, lags + 1) if isinstance(lags, int | np.integer) else np.asarray(lags)
    whole = given.astype(np.int64) if given.dtype.kind in "iu" and given.ndim == 1 else np.zeros(1, np.int64)
    if not len(whole) or whole[0] < 1 or (np.diff(whole) < 1).any():
        raise ConfigError(f"lags must be a whole number of at least 1, or ascending ones, got {lags!r}")
    return whole


def _checked(e: Floats, lags: NDArray[np.int64]) -> Floats:
    """e as float64 [T, p], that can be tested at these lags."""
    e = real("errors", e)
    if e.ndim != 2 or not e.shape[1]:
        raise DataError(
            f"errors must be an array [samples, channels], got one of shape {e.shape}; of one channel: e[:, None]"
        )
    count, channels = e.shape
    least = 2 * int(lags[-1]) + channels + 1
    if count < least:
        raise DataError(
            f"{count} samples of {channels} channels are too few for lag {lags[-1]}; give at least {least}, or test "
            "smaller lags"
        )
    if not np.isfinite(e).all():
        row, column = np.argwhere(~np.isfinite(e))[0]
        raise DataError(f"errors must be finite, got {e[row, column]} at sample {row} of channel {column}")
    e = e / np.maximum(np.abs(e).max(0), np.finfo(float).tiny)  # no test depends on units, but squares overflow in some
    flat = e.std(0) <= 1e-12
    if flat.any():
        raise DataError(f"channel {int(flat.argmax())} is constant, so nothing about it can be tested; leave it out")
    smallest = np.linalg.eigvalsh(np.corrcoef(e.T).reshape(channels, channels))[0]
    if smallest < SINGULAR:
        raise DataError(
            f"the {channels} channels depend on each other: the smallest eigenvalue of their correlations is "
            f"{smallest:.1e}, expected at least {SINGULAR}; leave one out, or project them to fewer"
        )
    return e


def _check_settings(
    fitted: int, tested: int, null: str | Draw, correction: str, level: float, samples: int, block: int
) -> None:
    if not callable(null) and null not in NULLS:
        raise ConfigError(f"unknown null {null!r}; {nearest(str(null), NULLS)}, or a function that draws residuals")
    if correction not in ("holm", "bh"):
        raise ConfigError(f"unknown correction {correction!r}; known: bh, holm")
    if not 0 < level < 1 or samples < 20 or block < 1:
        raise ConfigError(
            "level must be between 0 and 1, samples at least 20 and block at least 1, got "
            f"{level}, {samples} and {block}"
        )
    if not 0 <= fitted < tested:
        raise ConfigError(
            f"fitted must be at least 0 and less than the {tested} correlations tested, got {fitted}; take more lags"
        )
    if fitted and null in ("martingale", "permutation"):
        raise ConfigError(
            f"null={null!r} can't know what {fitted} fitted parameters do to the errors; take the table, or give a "
            "function that simulates the model, fits it again and returns its residuals"
        )
