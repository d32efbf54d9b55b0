"""How fast what is stored fades, learned from prediction: fixed share over half-lives.

A block of age a (in chunks; 0 is the newest) counts 2^(-a/h) for a half-life h. No one h is right: the world stands
still, drifts, or turns over. So several are weighed against each other by how well a memory of each alone would have
predicted what came (Herbster and Warmuth 1998, "Tracking the best expert"):

    w_j <- (1 - s) w_j 2^(-loss_j) / m + s v_j,      m = sum_j w_j 2^(-loss_j)          (losses in bits; v the prior)

-log2 m is the loss of the mixture. Over T predictions it is at most that of the best sequence of half-lives with k
changes, plus log2 J + k log2(J/s) - (T-1-k) log2(1 - s + s/J) bits, whatever the data.

Only ratios between losses move weights, so a burst of noise, bad for all half-lives alike, moves none. Decay is a
weight and deletes nothing: `Decay.demoted` only says what has faded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bmojo.errors import ConfigError, DataError, StateError
from bmojo.files import optional_module
from bmojo.memory.engines import Engine

_log = logging.getLogger("bmojo.memory")
_LN2 = math.log(2)
_LOG_TRUST = np.log([0.9, 0.1])  # in the global weights and a cluster's own, before the cluster has proved itself


def fixed_share(
    log_weights: np.ndarray, losses: np.ndarray, share: float, log_prior: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the update above, in log space: the new log-weights [..., J], and -log2 m [...].

    log_weights, losses (bits) [..., J]; log_prior: a number or [J], its exponentials summing to 1.
    """
    joint = log_weights - _LN2 * losses
    log_m = np.logaddexp.reduce(joint, axis=-1, keepdims=True)
    kept = math.log1p(-share) + joint - log_m
    shared = log_prior + math.log(share) if share else np.float64(-np.inf)
    return np.logaddexp(kept, shared), -log_m[..., 0] / _LN2


def rate_losses(
    logits: np.ndarray,
    ages: np.ndarray,
    tokens: np.ndarray,
    target: np.ndarray,
    base_log_prob: np.ndarray,
    half_lives: Sequence[float],
    *,
    base: float = 0.1,
) -> np.ndarray:
    """Bits that the memory with each half-life alone needs for the token that came.

    p_j(x) = (1 - base) sum_{i: token_i = x} softmax_i(logit_i + log 2^(-age_i/h_j)) + base p_model(x)

    logits, ages, tokens [..., m]: of what was retrieved, -inf where nothing was, and the token each votes for.
    target, base_log_prob [...]: the token, and the natural log of its probability without the memory, which keeps the
    loss finite and is all of p_j where nothing was retrieved. Returns float64 [..., J].
    """
    aged = _aged(logits, ages, half_lives)
    mass = _log_sum_exp(aged, -2)
    hits = _log_sum_exp(np.where((tokens == np.asarray(target)[..., None])[..., None], aged, -np.inf), -2)
    own = np.asarray(base_log_prob, np.float64)[..., None]
    with np.errstate(invalid="ignore"):  # -inf - -inf where nothing was retrieved
        mixed = np.logaddexp(math.log1p(-base) + hits - mass, math.log(base) + own)
    return -np.where(np.isneginf(mass), own, mixed) / _LN2


def clusters_of(keys: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The cluster, int64 [...] in [0, count), of keys or queries [..., dim]: the nearest of count/2 random directions
    and their opposites (cross-polytope hashing, Andoni et al. 2015). It depends on nothing but the key and the seed."""
    if count < 2 or count % 2:
        raise ConfigError(f"clusters must be even and positive, got {count}")
    draws = _hash(seed, np.arange(keys.shape[-1] * count // 2)) >> np.uint64(63)
    along = keys @ (2 * draws.astype(np.float32) - 1).reshape(keys.shape[-1], -1)
    return np.argmax(np.concatenate([along, -along], -1), -1)


@dataclass(frozen=True, kw_only=True)
class DecayPolicy:
    """The settings of `Decay`. Ages and half-lives are in chunks. Raises ConfigError for a value out of range."""

    half_lives: tuple[float, ...] = (math.inf, 3000.0, 1000.0, 300.0, 100.0, 30.0)
    share: float = 0.005  # s: about one change of half-life in 1/s predictions
    clusters: int = 64  # of keys, with weights of their own; 0: none
    floor: float = 2.0**-10  # what counts less has faded
    negligible: float = 1e-3  # half-lives of a lower weight have no say in what has faded
    grace: float = 3000.0  # chunks between fading and being let go
    exploration: float = 0.01  # of retrievals ignore decay: what is never retrieved could never prove its worth
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_lives", tuple(map(float, self.half_lives)))
        if not self.half_lives or not all(h > 0 for h in self.half_lives):
            raise ConfigError(f"half_lives must be one or more positive numbers (inf: never), got {self.half_lives}")
        for name in ("share", "exploration", "negligible", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 0 or more and below 1, got {getattr(self, name)}")
        if self.clusters < 0 or self.clusters % 2:
            raise ConfigError(f"clusters must be even, 0 or more, got {self.clusters}")
        if not 0 <= self.grace < math.inf:
            raise ConfigError(f"grace must be a number of chunks, 0 or more, got {self.grace}")

    def cluster(self, keys: np.ndarray) -> np.ndarray | None:
        """The clusters of keys or queries; None if there are none."""
        return clusters_of(keys, self.clusters, self.seed) if self.clusters else None

    def bands(self, generation: int, ids_per_chunk: int = 1) -> list[tuple[int, int]]:
        """Ids in bands of age that end at the half-lives, newest first, as (after, newest) of each."""
        ends = [generation - int(h) * ids_per_chunk for h in sorted(self.half_lives) if math.isfinite(h)]
        edges = [generation, *(end for end in ends if end >= 0), -1]
        return [(after, newest) for newest, after in pairwise(edges)]

    def explores(self, positions: np.ndarray) -> np.ndarray:
        """Which retrievals, by the positions int [...] of their queries, ignore decay: the same in every replay."""
        return _hash(self.seed, positions) < np.uint64(self.exploration * 2.0**64)


class Demoted(NamedTuple):
    """What has faded, of blocks [n]. since: the age at which each was first seen faded, -1 for one that has not;
    disk, gone: masks of those within their grace period, and of those beyond it."""

    since: np.ndarray
    disk: np.ndarray
    gone: np.ndarray


@dataclass(frozen=True, eq=False)
class Decay:
    """Weights of the half-lives, for all predictions and for each cluster of keys. A value: `update` makes another.

    rates  [1 + clusters, J]: log-weights, of all predictions, then of each cluster's own
    trust  [clusters, 2]: log-weights of the first row and of the cluster's own, learned by the same rule from a prior
           of 0.9 and 0.1: a cluster goes by the global weights until its own have predicted better
    """

    policy: DecayPolicy = field(default_factory=DecayPolicy)
    rates: np.ndarray = None  # type: ignore[assignment]
    trust: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        count = len(self.policy.half_lives)
        if self.rates is None:
            object.__setattr__(self, "rates", np.full((1 + self.policy.clusters, count), -math.log(count)))
            object.__setattr__(self, "trust", np.tile(_LOG_TRUST, (self.policy.clusters, 1)))

    def update(self, losses: np.ndarray, cluster: np.ndarray | None = None) -> tuple[Decay, np.ndarray]:
        """The weights after predictions with these losses (bits, [n, J], in order), and the mixture's own losses [n].

        cluster: int [n], of the queries that predicted; None leaves the clusters as they are. Raises DataError for a
        loss that is not finite.
        """
        if not np.isfinite(losses).all():
            raise DataError("losses of half-lives must be finite; mix the memory's prediction with the model's own")
        rates, trust, bits = self.rates.copy(), self.trust.copy(), np.empty(len(losses))
        prior = -math.log(rates.shape[1])
        for n, loss in enumerate(losses):
            rows = slice(1) if cluster is None else [0, cluster[n] + 1]
            rates[rows], each = fixed_share(rates[rows], loss, self.policy.share, prior)
            if cluster is None:
                bits[n] = each[0]
            else:
                trust[cluster[n]], bits[n] = fixed_share(trust[cluster[n]], each, self.policy.share, _LOG_TRUST)
        return replace(self, rates=rates, trust=trust), bits

    def log_weights(self, cluster: np.ndarray | int | None = None) -> np.ndarray:
        """Log-weights [J], or [..., J] of clusters int [...]; their exponentials sum to 1."""
        if cluster is None:
            return self.rates[0]
        trust = self.trust[cluster]
        return np.logaddexp(trust[..., :1] + self.rates[0], trust[..., 1:] + self.rates[np.asarray(cluster) + 1])

    def log_mixture(self, ages: np.ndarray, cluster: np.ndarray | int | None = None) -> np.ndarray:
        """log sum_j w_j 2^(-age/h_j), for ages [..., n] and clusters [...]: what a block of that age counts."""
        faded = _LN2 * np.asarray(ages)[..., None] / np.array(self.policy.half_lives)
        return _log_sum_exp(self.log_weights(cluster)[..., None, :] - faded, -1)

    def scores(self, logits: np.ndarray, ages: np.ndarray, cluster: np.ndarray | int | None = None) -> np.ndarray:
        """Logits [..., m] of blocks of these ages, with decay, for queries of clusters [...]:

            s_i = log sum_j w_j softmax_i(logits + log 2^(-ages/h_j)) + log sum_i exp logits_i

        the mixture of what each half-life would attend to: that which the weights were learned for. All blocks
        together count as much as without decay; the mixture decides which of them.

        Adding `log_mixture` to the logits is not the same: there are so many more old blocks than new ones that a
        small weight of a long half-life outvotes a large one of a short one (docs/decay.md).
        """
        aged = _aged(logits, ages, self.policy.half_lives)
        mass = _log_sum_exp(aged, -2)
        weights = self.log_weights(cluster) - np.where(np.isneginf(mass), 0, mass)
        return _log_sum_exp(weights[..., None, :] + aged, -1) + _log_sum_exp(np.asarray(logits), -1)[..., None]

    @property
    def half_life(self) -> float:
        """The age in chunks at which a block counts one half, sum_j w_j 2^(-age/h_j) = 1/2; inf if none does so."""
        weights = np.exp(self.log_weights()).tolist()

        def counts(age: float) -> float:
            return sum(w * 2.0 ** (-age / h) for w, h in zip(weights, self.policy.half_lives, strict=True))

        low, high = 0.0, 1.0
        while counts(high) > 0.5:
            low, high = high, 2 * high
            if high > 1e300:
                return math.inf
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if counts(middle) > 0.5 else (low, middle)
        return high

    def demoted(self, ages: np.ndarray, since: np.ndarray, cluster: np.ndarray | None = None) -> Demoted:
        """Which of the blocks of these ages [n] have faded: those that count less than the floor with every half-life
        of more than negligible weight, in their clusters [n] if given. From memory they go to disk, and after the
        grace period they may be let go; one that counts again, because the weights have changed, comes back.

        since [n]: what this said before, -1 for new blocks. Asked again with its own answer it says the same. With
        share/J at `negligible` or above, infinite half-lives always have a say, and nothing fades.
        """
        ages, since = np.asarray(ages, np.float64), np.asarray(since, np.float64)
        faded = -ages[:, None] / np.array(self.policy.half_lives) < math.log2(max(self.policy.floor, 1e-300))
        has_say = np.exp(self.log_weights(cluster)) > self.policy.negligible
        since = np.where((faded | ~has_say).all(-1), np.where(since < 0, ages, since), -1)
        gone = (since >= 0) & (ages - since >= self.policy.grace)
        return Demoted(since, (since >= 0) & ~gone, gone)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; infinite half-lives as null."""
        policy = asdict(self.policy)
        policy["half_lives"] = [None if math.isinf(h) else h for h in self.policy.half_lives]
        return {"policy": policy, "rates": self.rates.tolist(), "trust": self.trust.tolist()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Decay:
        """The inverse of `to_dict`, exactly. Raises StateError for what is none of its work."""
        try:
            policy = dict(fields["policy"])
            policy["half_lives"] = tuple(math.inf if h is None else h for h in policy["half_lives"])
            made = cls(DecayPolicy(**policy))
            rates, trust = np.array(fields["rates"], np.float64), np.array(fields["trust"], np.float64)
            if rates.shape != made.rates.shape or trust.reshape(-1, 2).shape != made.trust.shape:
                raise ValueError(
                    f"weights {rates.shape} and {trust.shape}, not {made.rates.shape} and {made.trust.shape}"
                )
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"weights of decay are damaged or of another format ({error}); start anew") from error
        return replace(made, rates=rates, trust=trust.reshape(-1, 2))


class DriftAlarm:
    """Says when the loss has changed, by ADWIN (Bifet and Gavalda 2007; the extra `drift`), and does nothing else.

    delta: the probability of a false alarm in each test.
    """

    def __init__(self, delta: float = 0.002) -> None:
        self._adwin = optional_module("river.drift", "an alarm of drift", "drift").ADWIN(delta=delta)
        self._seen = 0

    def update(self, bits: Sequence[float] | np.ndarray) -> bool:
        """Whether it rang at any of these losses, which then is logged as a warning too."""
        rang = False
        for value in bits:
            before = self._adwin.estimation
            self._adwin.update(float(value))
            self._seen += 1
            if self._adwin.drift_detected:
                rang = True
                _log.warning(
                    "drift at prediction %d: %.3f bits before, %.3f now", self._seen, before, self._adwin.estimation
                )
        return rang


class Reranked(NamedTuple):
    """As `Found`, by descending score, which is the similarity with decay; all [queries, count]. The difference of the
    two, where id >= 0, is for the logits of a block's tokens: decay of the choice alone is too little."""

    score: np.ndarray
    id: np.ndarray
    similarity: np.ndarray


def reranked(
    engine: Engine,
    layer: int,
    queries: np.ndarray,
    count: int,
    generation: int,
    decay: Decay,
    *,
    positions: np.ndarray | None = None,
    ids_per_chunk: int = 1,
) -> Reranked:
    """The `count` blocks of highest score, decay included, for each of the queries [n, dim].

    Blocks are searched in bands of age that end at the half-lives, the `count` most similar of each, and scored
    together by `Decay.scores` with the weights of the queries' clusters. Exact where no band holds more than `count`
    blocks. Else a block may be missed for one of its band that is older but more similar, and scores are those among
    what was found.

    positions int [n]: of the queries; those that `DecayPolicy.explores` names are ranked by similarity alone.
    ids_per_chunk: how many ids a chunk uses up: the layers with storage.
    """
    ends = [generation - int(h) * ids_per_chunk for h in sorted(decay.policy.half_lives) if math.isfinite(h)]
    edges = [generation, *(end for end in ends if end >= 0), -1]
    bands = [engine.search(layer, queries, count, generation=newest, after=after) for newest, after in pairwise(edges)]
    similarity, ids = (np.concatenate(parts, 1) for parts in zip(*bands, strict=True))
    score = decay.scores(similarity, (generation - ids) // ids_per_chunk, decay.policy.cluster(queries))
    if positions is not None:
        score = np.where(decay.policy.explores(positions)[:, None], similarity, score)
    order = np.lexsort((-ids, -score), axis=1)[:, :count]
    score, ids, similarity = (np.take_along_axis(array, order, 1) for array in (score, ids, similarity))
    return Reranked(score.astype(np.float32), ids, similarity)


def _aged(logits: np.ndarray, ages: np.ndarray, half_lives: Sequence[float]) -> np.ndarray:
    """logit_i + log 2^(-age_i/h_j): float64 [..., m, J]."""
    return np.asarray(logits, np.float64)[..., None] - _LN2 * np.asarray(ages)[..., None] / np.asarray(half_lives)


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    with np.errstate(divide="ignore"):
        return np.squeeze(np.log(np.exp(x - top).sum(axis, keepdims=True)) + top, axis)


def _hash(seed: int, numbers: np.ndarray) -> np.ndarray:
    """64 bits for each number, as good as random and the same for ever: Steele, Lea and Flood's SplitMix64 (2014)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):  # modulo 2^64, of which numpy warns for single numbers
        return mix(mix(np.asarray(seed).astype(np.uint64)) + np.asarray(numbers).astype(np.uint64))
