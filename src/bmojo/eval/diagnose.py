"""Are the prediction errors of a trained model white, and if not, how far back is the memory that it lacks?

    chosen = choose(store, reach=reach(model.config))                # documents, and bands of lags that they allow
    basis = token_basis(chosen.counts(256), model.embed.weight)     # [vocab, channels]
    found = diagnose(read(model, chosen, basis), chosen.bands)

Of the token x_t and the model's distribution q_t over it, given all before, the error is

    e_t = v(x_t) - sum_x q_t(x) v(x),       v(x): a fixed vector of each token

If q_t is right, E[e_t | x_{t-1}, x_{t-2}, ...] = 0: nothing in the past predicts e_t. Four views of that:

- a portmanteau test of e_t against e_{t-k}, lag by lag (`bmojo.realize.whiteness`, null "martingale"), on the second
  half of the text;
- a probe: ridge regression of e_t on the errors of a band of lags, fitted on the first half of the text and scored on
  the second;
- the same probe on the vectors v(x_{t-k}) of the text itself. A model that makes the best of what it remembers has
  errors uncorrelated with all of that, so this one fails just where memory ends; the errors of a model with a short
  memory correlate with its last errors, too, since those tell of the text beyond;
- a probe that looks for repeats: v(x_{t-k}) - sum_x q_t(x) v(x), where t-k is the last place in the band that the same
  2, 4 or 8 tokens stand before. To mix in a share a of what followed there, as a memory that copies would, changes e_t
  by -a times that: what it explains is what such a memory of that reach would add.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, DataError
from bmojo.eval.text import LOGITS_AT_ONCE, Documents, bootstrap_ratio
from bmojo.figures import STYLES, line_at, make_picture, new_figure, token_axis
from bmojo.figures import draw as draw_line
from bmojo.files import optional_module
from bmojo.nn.model import BMojoLM
from bmojo.ops.numerics import at_least_float32
from bmojo.realize.whiteness import rejected, whiteness

EDGES = (1, 4, 16, 64, 256, 1024, 4096)
SEGMENT = 1024  # tokens read at once; bounds the memory that a long text takes
ROWS = 8192  # whose regressors are held at once
PICKED = 8  # single lags of a band that a probe looks at, beside the mean over all of it
ALIKE = (2, 4, 8)  # tokens before a repeat
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)  # of ridge, in units of the regressors' variance
RAREST = 0.01  # of the largest regressor: what is smaller, as of repeats that hardly occur, is held to more
BLOCKS = 100  # of the held-out half, drawn again for its intervals
SIGNS = 200  # blocks of the portmanteau test, each with a sign of its own
LEAST = 1024  # tokens; too few for any test below
VIEWS = 5  # all lags together, lag by lag, three probes: each has a fifth of the level, for any of them may fail
CHANNELS = 8

Floats = NDArray[np.float64]
Band = tuple[int, int]  # first and last lag


@dataclass(frozen=True)
class Reading:
    """Tokens [rows], their vectors and errors [rows, channels], document behind document. Between documents are rows of
    zeros, token -1, so that no lag reaches from one into another. `live` [rows]: where a prediction was made."""

    tokens: NDArray[np.int64]
    vectors: Floats
    errors: Floats
    live: NDArray[np.bool_]


@dataclass(frozen=True)
class Probe:
    """What one band of lags explains of the errors of the held-out half.

    share   of their variance (of the squared length of e_t), with its 95 % interval: of the probe as it was fitted, so
            no more than there is; below 0 if it explains nothing
    p       of the hypothesis that it explains nothing
    fails   whether that falls at the level of `Diagnosis`, after Holm's correction for all bands, that of all lags
            among them, and the share is above 0
    """

    share: float
    ci95: tuple[float, float]
    p: float
    fails: bool


@dataclass(frozen=True)
class Diagnosis:
    """p: of the portmanteau test of all `lags` together. lag_shares: of the (whitened) variance of e_t that e_{t-k}
    explains, less what it would by chance. own_past, text, repeats: the probes, one for each band and one of all.
    level: of the test of all lags, of `failing`, and of each of the three probes."""

    tokens: int
    channels: int
    p: float
    lags: list[int]
    lag_shares: list[float]
    lag_p: list[float]
    failing: list[int]
    bands: list[Band]
    own_past: list[Probe]
    text: list[Probe]
    repeats: list[Probe]
    level: float

    @property
    def white(self) -> bool:
        """Whether nothing fails; of a model that is right that is so but for the `level` given to `diagnose`."""
        probes = (*self.own_past, *self.text, *self.repeats)
        return self.p > self.level and not self.failing and not any(probe.fails for probe in probes)


@dataclass(frozen=True)
class Chosen:
    """Documents to read, the bands of lags that they are long enough for, and in words what was left out."""

    documents: list[NDArray[np.unsignedinteger]]
    bands: list[Band]
    left_out: list[str]

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs."""
        return np.bincount(np.concatenate(self.documents), minlength=vocab_size)


def choose(
    store: Documents, edges: Sequence[int] | None = None, *, reach: int | None = None, max_tokens: int | None = None
) -> Chosen:
    """The documents of at least twice the longest lag, in order, up to `max_tokens` of them.

    Bands end at `edges`, or else at EDGES, and at `reach`, as far as there are `needed` tokens in documents that long,
    and these are half of the text. Raises DataError for a text too short for `edges`, or for any.
    """
    wanted = sorted({*EDGES, *([reach] if reach and reach < EDGES[-1] else [])}) if edges is None else list(edges)
    allowed = bands(wanted)
    total = int(store.lengths.sum())
    limit = total if max_tokens is None else min(total, max_tokens)

    def usable(last: int) -> int:
        return min(limit, int(store.lengths[store.lengths >= 2 * last].sum()))

    fit = [last for last in wanted if usable(last) >= needed(last) + 1]
    if edges is None:
        fit = [last for last in fit if 2 * usable(last) >= limit]
    if not fit or (edges is not None and fit != wanted):
        last = wanted[0 if edges is None else -1]
        raise DataError(
            f"the text is too short: lags up to {last:,} need {needed(last) + 1:,} tokens in documents of at least "
            f"{2 * last:,}, got {usable(last):,}; give more text{'' if edges is None else ', or end --lags sooner'}"
        )
    left_out = []
    if len(fit) < len(wanted):
        first, last = allowed[len(fit)]
        left_out.append(f"lags {first:,} to {wanted[-1]:,}: they need {needed(last) + 1:,} tokens or more in documents "
                        f"of at least {2 * last:,}, and half of the text in such")  # fmt: skip
    documents: list[NDArray[np.unsignedinteger]] = []
    read = 0
    for i in np.flatnonzero(store.lengths >= 2 * fit[-1]):
        if read >= limit:
            break
        documents.append(store[int(i)][: limit - read])
        read += len(documents[-1])
    short = int(store.lengths[store.lengths < 2 * fit[-1]].sum())
    if short:
        left_out.append(f"{short:,} of {total:,} tokens, in documents shorter than {2 * fit[-1]:,}")
    if read < total - short:
        left_out.append(f"{total - short - read:,} of {total:,} tokens, beyond the first {limit:,}")
    return Chosen(documents, allowed[: len(fit)], left_out)


def token_basis(counts: NDArray[np.int64], embedding: Tensor | None, *, channels: int = CHANNELS) -> Floats:
    """Vectors v(x) [vocab, at most `channels`]: the principal components, over tokens as often as the text has them, of
    the rows of `embedding` [vocab, size], or of one-hot vectors if None; their mean is taken off.

    Fewer if so many do not vary. Raises DataError for a text of one token over and over.
    """
    weight = counts / counts.sum()
    rows = np.eye(len(counts)) if embedding is None else embedding.detach().double().cpu().numpy()
    rows = rows - weight @ rows
    variance, axes = np.linalg.eigh(rows.T @ (weight[:, None] * rows))
    rank = int((variance > 1e-9 * variance[-1]).sum()) if variance[-1] > 0 else 0
    kept = min(channels, rank, int((counts > 0).sum()) - 1)
    if kept < 1:
        raise DataError("the text is one token over and over: nothing about it can be predicted, or not")
    return rows @ axes[:, ::-1][:, :kept]


@torch.inference_mode()
def read(
    model: BMojoLM, chosen: Chosen, basis: Floats, *, context: int | None = None, segment: int = SEGMENT
) -> Reading:
    """Errors of a model on documents, each read from an empty state, `segment` tokens at a time with the state carried;
    with `context`, the state is emptied after every so many tokens.

    Beside the errors, memory is that of a segment and of the model's state.
    """
    documents, gap = chosen.documents, chosen.bands[-1][1]
    rows = sum(map(len, documents)) + gap * (len(documents) - 1)
    errors, vectors = np.zeros((2, rows, basis.shape[1]))
    everything, live = np.full(rows, -1), np.zeros(rows, dtype=bool)
    table = torch.from_numpy(basis).to(model.embed.weight.device)
    begin = 0
    for document in documents:
        everything[begin : begin + len(document)] = document
        vectors[begin : begin + len(document)] = basis[document]
        tokens = torch.from_numpy(document.astype(np.int64)).to(table.device)
        for start, expected in _expected(model, tokens, table, context, segment):
            at = slice(begin + start, begin + start + len(expected))
            errors[at], live[at] = vectors[at] - expected, True
        begin += len(document) + gap
    return Reading(everything, vectors, errors, live)


def _expected(
    model: BMojoLM, tokens: Tensor, table: Tensor, context: int | None, segment: int
) -> Iterator[tuple[int, Floats]]:
    """(first, sum_x q_t(x) v(x) of the tokens from there on), for all tokens but the first of each context."""
    at_once = max(1, LOGITS_AT_ONCE // len(table))
    span = context or len(tokens)
    for begin in range(0, len(tokens) - 1, span):
        state = None
        end = min(begin + span, len(tokens) - 1)
        for start in range(begin, end, segment):
            stop = min(start + segment, end)
            features, state = model.features(tokens[None, start:stop], state)
            means = []
            for part in features[0].split(at_once):
                q = at_least_float32(model.logits(part)).softmax(-1)
                means.append((q @ table.to(q.dtype)).double())
            yield start + 1, torch.cat(means).cpu().numpy()


def diagnose(
    reading: Reading, bands: Sequence[Band], *, level: float = 0.05, samples: int = 99, seed: int = 0
) -> Diagnosis:
    """Tests of the errors at the lags up to the last of `bands`, which ascend. `samples`, `seed`: draws of the test.
    `level`: the chance, at most, that a model that is right fails anything at all; each of the VIEWS has its share.

    The portmanteau test is of the second half of the text, at `sampled_lags` and at those that the probes picked on the
    first half, with signs that change SIGNS times.
    The probe of a band sees PICKED single lags of it, those of greatest correlation on the first half of the text, and
    the mean over the band. Its penalty is the best on the last fifth of that half. With s_t = e_t . f_t of its forecast
    f_t on the second half, sum s_t / sqrt(sum s_t^2) is standard normal where the model is right, whatever the
    variance depends on, as f_t knows the past alone; p is one-sided. Its share is sum (2 s_t - |f_t|^2) / sum |e_t|^2,
    its interval the percentile bootstrap over BLOCKS blocks of the second half.
    Sources: Clark and West 2007, J. Econometrics 138 (the test); `bmojo.realize.whiteness`.
    """
    tokens, last = int(reading.live.sum()), bands[-1][1]
    if tokens < needed(last):
        raise DataError(
            f"the text has {tokens:,} tokens to test, and lags up to {last:,} need at least {needed(last):,}; "
            "give more text, or test smaller lags"
        )
    level /= VIEWS
    past_errors, past_text = (_lagged(reading, past, bands) for past in (reading.errors, reading.vectors))
    held_out = reading.errors[_half(reading) :]
    rows = len(held_out)
    lags = sorted({*sampled_lags(last), *past_errors.single})
    found = whiteness(held_out, lags, null="martingale", level=level, samples=samples, block=max(1, rows // SIGNS),
                      seed=seed)  # fmt: skip
    shares = (found.each - found.each_mean) * (rows - found.lags) / rows**2 / held_out.shape[1]
    return Diagnosis(
        tokens=tokens,
        channels=reading.errors.shape[1],
        p=float(found.total_p[-1]),
        lags=found.lags.tolist(),
        lag_shares=shares.tolist(),
        lag_p=found.each_p.tolist(),
        failing=list(found.failing),
        bands=list(bands),
        own_past=_probe(reading, past_errors, seed, level),
        text=_probe(reading, past_text, seed, level),
        repeats=_probe(reading, _Repeats(reading, bands), seed, level),
        level=level,
    )


def needed(last: int) -> int:
    """Tokens that lags up to this one need."""
    return max(LEAST, 8 * last)


def bands(edges: Sequence[int]) -> list[Band]:
    """The lags from each edge (not included) to the next: (1, 1), (2, 4), (5, 16), ... of 1, 4, 16, ..."""
    if not len(edges) or edges[0] < 1 or (np.diff(edges) < 1).any():
        raise ConfigError(f"lags must ascend from at least 1, got {','.join(map(str, edges))}; for example 1,4,16,64")
    return [(before + 1, edge) for before, edge in zip((0, *edges), edges, strict=False)]


def sampled_lags(last: int) -> list[int]:
    """Lags for the portmanteau test: all to 16, then eight an octave to `last`."""
    octaves = 16 * 2 ** (np.arange(1, 8 * 32) / 8)
    return sorted({lag for lag in [*range(1, 17), *octaves.round().astype(int).tolist(), last] if lag <= last})


def reach(config: ModelConfig, context: int | None = None) -> int | None:
    """How many of the last tokens a model can know anything of; None: there is no limit."""
    windows = [None if part.ssm or part.eidetic else config.window_of(kind)
               for kind in config.kinds for part in (config.parts(kind),)]  # fmt: skip
    if None in windows:
        return context
    steps = sum(window - 1 + max(config.conv_size - 1, 0) for window in windows if window is not None)
    return steps + 1 if context is None else min(steps + 1, context)


class _Regressors(ABC):
    """What a probe sees, row by row; `columns`: those of each band."""

    columns: list[NDArray[np.int64]]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Floats:
        """Of the rows from `start` to `stop`, all columns; zeros where no prediction was made."""


def _half(reading: Reading) -> int:
    """The first row of the half that probes are scored on."""
    return int(np.searchsorted(reading.live.cumsum(), reading.live.sum() / 2))


def _probe(reading: Reading, regressors: _Regressors, seed: int, level: float) -> list[Probe]:
    """A probe of each band, and one of all of them."""
    errors, rows, half = reading.errors, len(reading.errors), _half(reading)
    fifth = half * 4 // 5
    fitted, chosen = (_Moments.of(regressors, errors, *span) for span in ((0, fifth), (fifth, half)))
    sets = [*regressors.columns, np.concatenate(regressors.columns)]
    weights = [_ridge(fitted, chosen, columns) for columns in sets]
    scores = np.zeros((len(sets), 2, rows - half))  # e . f, f . f
    for start in range(half, rows, ROWS):
        stop = min(start + ROWS, rows)
        x = regressors.rows(start, stop)
        for (products, squares), columns, weight in zip(scores, sets, weights, strict=True):
            forecast = x[:, columns] @ weight
            products[start - half : stop - half] = (errors[start:stop] * forecast).sum(1)
            squares[start - half : stop - half] = (forecast**2).sum(1)
    live = reading.live[half:]
    power = (errors[half:][live] ** 2).sum(1)
    ndtr = optional_module("scipy.special", "the test of whiteness", "realize").ndtr
    starts = np.linspace(0, len(power), BLOCKS, endpoint=False).astype(int)
    found: list[tuple[float, tuple[float, float], float]] = []
    for products, squares in scores[:, :, live]:
        gains = 2 * products - squares
        ci95 = bootstrap_ratio(np.add.reduceat(gains, starts), np.add.reduceat(power, starts), seed)
        score = products.sum() / max(np.sqrt((products**2).sum()), np.finfo(float).tiny)
        found.append((float(gains.sum() / power.sum()), ci95, float(ndtr(-score))))
    falls = rejected(np.array([p for *_, p in found]), level)
    return [Probe(*probe, bool(fall and probe[0] > 0)) for probe, fall in zip(found, falls, strict=True)]


def _strengths(errors: Floats, past: Floats, last: int) -> Floats:
    """[last]: sum of the squared correlations of the channels of e_t and past_{t-k}, k = 1 ... last."""
    size = 1 << (ROWS + last - 1).bit_length()
    products = np.zeros((last, errors.shape[1], past.shape[1]))
    padded = np.vstack([np.zeros((last, past.shape[1])), past])  # row t of `past` is row t + last
    for start in range(0, len(errors), ROWS):
        stop = min(start + ROWS, len(errors))
        e = np.fft.rfft(errors[start:stop], size, axis=0)
        before = np.fft.rfft(padded[start : stop + last], size, axis=0)
        for i in range(errors.shape[1]):
            products[:, i] += np.fft.irfft(np.conj(e[:, i, None]) * before, size, axis=0)[:last][
                ::-1
            ]  # of lags last ... 1
    spread = (errors**2).sum(0)[:, None] * (past**2).sum(0)
    return (products**2 / spread).sum((1, 2))


def _lagged(reading: Reading, past: Floats, bands: Sequence[Band]) -> _Lagged:
    half = _half(reading)
    return _Lagged(past, bands, _strengths(reading.errors[:half], past[:half], bands[-1][1]), reading.live)


class _Lagged(_Regressors):
    """Of each band, past_{t-k} at its strongest lags and the mean over all of its lags."""

    def __init__(self, past: Floats, bands: Sequence[Band], strengths: Floats, live: NDArray[np.bool_]) -> None:
        self.last, self.live = bands[-1][1], live
        self.past = np.vstack([np.zeros((self.last, past.shape[1])), past])
        self.sums = np.vstack([np.zeros((1, past.shape[1])), self.past.cumsum(0)])
        self.spans: list[Band] = []  # that past is averaged over
        self.single: list[int] = []  # the lags that stand alone
        self.columns = []
        for first, last in bands:
            strongest = np.sort(np.argsort(-strengths[first - 1 : last], kind="stable")[:PICKED]) + first
            self.single += strongest.tolist()
            spans = [(lag, lag) for lag in strongest.tolist()]
            spans += [(first, last)] if last - first >= PICKED else []
            begin = len(self.spans) * past.shape[1]
            self.columns.append(np.arange(begin, begin + len(spans) * past.shape[1]))
            self.spans += spans

    def rows(self, start: int, stop: int) -> Floats:
        at = self.last + np.array([start, stop])
        parts = []
        for first, last in self.spans:
            if first == last:
                parts.append(self.past[slice(*(at - first))])
            else:
                parts.append(
                    (self.sums[slice(*(at - first + 1))] - self.sums[slice(*(at - last))]) / (last - first + 1)
                )
        return np.hstack(parts) * self.live[start:stop, None]


class _Repeats(_Regressors):
    """v(x_{t-k}) - sum_x q_t(x) v(x), with the smallest k in each band at which the same tokens stand before, for each
    number of tokens in ALIKE; zero where there is none."""

    def __init__(self, reading: Reading, bands: Sequence[Band]) -> None:
        self.reading = reading
        size = reading.errors.shape[1]
        self.matches = [_matches(same, band) for band in bands for same in _contexts(reading.tokens)]
        each = np.arange(len(ALIKE) * size)
        self.columns = [each + i * len(each) for i in range(len(bands))]

    def rows(self, start: int, stop: int) -> Floats:
        vectors, live = self.reading.vectors, self.reading.live[start:stop]
        expected = vectors[start:stop] - self.reading.errors[start:stop]
        parts = []
        for match in self.matches:
            at = match[start:stop]
            parts.append(np.where(((at >= 0) & live)[:, None], vectors[at] - expected, 0.0))
        return np.hstack(parts)


def _contexts(tokens: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """For each n of ALIKE, which double from 2 on, the number [rows] of the n tokens before; -1 if there are none."""
    found = []
    same, length = np.concatenate([[-1], tokens[:-1]]), 1
    for n in ALIKE:
        before = np.concatenate([np.full(length, -1), same[:-length]])
        _, pair = np.unique(same * (before.max(initial=0) + 2) + before, return_inverse=True)
        same, length = np.where((same >= 0) & (before >= 0), pair, -1), n
        found.append(same)
    return found


def _matches(same: NDArray[np.int64], band: Band) -> NDArray[np.int64]:
    """The last row [rows] with the same number, `band` rows before; -1 where there is none."""
    rows = len(same)
    place = np.arange(rows)
    keys = np.sort(same * rows + place)  # those of one number in a run, by row
    found = np.searchsorted(keys, same * rows + place - band[0], side="right") - 1
    number, at = np.divmod(keys[found.clip(0)], rows)
    return np.where((found >= 0) & (same >= 0) & (number == same) & (at >= place - band[1]), at, -1)


@dataclass(frozen=True)
class _Moments:
    """Sums over rows of x x' and x e' of regressors x and errors e, and how many rows."""

    xx: Floats
    xe: Floats
    rows: int

    @classmethod
    def of(cls, regressors: _Regressors, errors: Floats, begin: int, end: int) -> _Moments:
        size = sum(map(len, regressors.columns))
        xx, xe = np.zeros((size, size)), np.zeros((size, errors.shape[1]))
        for start in range(begin, end, ROWS):
            stop = min(start + ROWS, end)
            x = regressors.rows(start, stop)
            xx += x.T @ x
            xe += x.T @ errors[start:stop]
        return cls(xx, xe, end - begin)


def _ridge(fitted: _Moments, chosen: _Moments, columns: NDArray[np.int64]) -> Floats:
    """Weights [columns, channels] fitted to both, with the penalty that is best on `chosen` for those of `fitted`."""
    square = np.ix_(columns, columns)
    scale = np.sqrt(np.diag(fitted.xx)[columns] / fitted.rows)
    scale = np.maximum(scale, RAREST * scale.max()) if scale.any() else np.ones(len(columns))

    def solutions(xx: Floats, xe: Floats, rows: int, penalties: Sequence[float]) -> Iterator[Floats]:
        values, axes = np.linalg.eigh(xx[square] / np.outer(scale, scale) / rows)
        turned = axes.T @ (xe[columns] / scale[:, None] / rows)
        for penalty in penalties:
            yield axes @ (turned / (values.clip(0) + penalty)[:, None]) / scale[:, None]

    gains = [
        2 * (weights * chosen.xe[columns]).sum() - (weights * (chosen.xx[square] @ weights)).sum()
        for weights in solutions(fitted.xx, fitted.xe, fitted.rows, PENALTIES)
    ]
    best = [PENALTIES[int(np.argmax(gains))]]
    return next(solutions(fitted.xx + chosen.xx, fitted.xe + chosen.xe, fitted.rows + chosen.rows, best))


def draw(found: Diagnosis, name: str, reach: int | None = None) -> bytes:
    """A PNG: what each lag explains, and what each band does on the held-out half, over the lag."""
    figure, (above, below) = new_figure(2, columns=1)
    for axis in (above, below):
        axis.set_yscale("symlog", linthresh=0.01)  # before anything is drawn: limits are chosen by it
    lags, shares = np.array(found.lags), 100 * np.array(found.lag_shares)
    failing = np.isin(lags, found.failing)
    above.plot(lags, shares, color="#bbbbbb", linewidth=1)
    for chosen, colour, label in ((failing, "#D55E00", "lag fails"), (~failing, "#999999", "lag does not fail")):
        above.plot(lags[chosen], shares[chosen], "o", color=colour, markersize=4, label=label)
    above.set_ylabel("explained by one lag, %")
    above.set_title(f"{name}: prediction errors against the errors before", fontsize=10, loc="left")
    at = [(first * last) ** 0.5 for first, last in found.bands]
    columns = ((found.own_past, "bmojo_f", "past errors"), (found.text, "bmojo", "past text"),
               (found.repeats, "mamba2", "repeats"))  # fmt: skip
    for (probes, preset, label), shift in zip(columns, (0.88, 1, 1.14), strict=True):
        share, low, high = 100 * np.array([[probe.share, *probe.ci95] for probe in probes[:-1]]).T
        points = zip(np.array(at) * shift, share, strict=True)
        draw_line(below, preset, points, label=label, linestyle="none")
        whiskers = {"fmt": "none", "capsize": 3, "color": STYLES[preset][0]}
        below.errorbar(np.array(at) * shift, share, [share - low, high - share], **whiskers)
    below.set_ylabel("held-out variance explained, %")
    for first, _ in found.bands[1:]:
        below.axvline(first - 0.5, color="#dddddd", linewidth=0.6)
    for axis in (above, below):
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if reach is not None:
            line_at(axis, reach + 0.5, "reach of the model")
        token_axis(axis, "lag, tokens")
        axis.set_xlim(0.8, 1.25 * found.lags[-1])
    return make_picture(figure, [above, below], "diagnose", "").png
