"""Decay in what a layer reads from storage: which blocks, how much of the attention they get, and what that taught it.

For every stride the candidates are, of each band of age between two half-lives, the `count` most similar blocks, so
that there is something for every half-life to attend to. Of these the `count` of highest `Decay.scores` are read, and
the logits of their tokens get `bias`, what decay makes of the block. When the stride is over, every half-life is told
how well what was read would have predicted its tokens with that half-life alone, and the weights move, once a stride.

A block's similarity is here the mean over heads of the logit that it was found with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmojo.errors import StateError
from bmojo.memory.decay import Decay, DecayPolicy, rate_losses

NOTES = "bmojo:decay"  # the source under whose name a store keeps what it has learned
LANES = 8  # by which queries and keys grow to carry a bias: kernels like whole vectors


def new_decay() -> Decay:
    """Weights of all keys alike: what is found is shared by all the queries of a stride."""
    return Decay(DecayPolicy(clusters=0))


@dataclass(frozen=True, eq=False)
class Faded:
    """Decay of one row and layer. A value. Of the blocks found for the stride it is in, best first: `age` in blocks and
    `bias`, what the logits of their tokens get. `origin`: the generation of the store when the row began."""

    decay: Decay
    age: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    origin: int = -1

    def bands(self, age: np.ndarray) -> np.ndarray:
        """The band of each age: how many of the half-lives are no longer than it."""
        return np.searchsorted(np.sort(self.decay.policy.half_lives), age, side="right")

    def choose(
        self, similarity: np.ndarray, age: np.ndarray, band: np.ndarray, count: int, begin: int
    ) -> tuple[np.ndarray, Faded]:
        """Of candidates [n], the newest first where they are equally similar, the best `count` for the stride from
        `begin` on: their indices, best first; and what it is from now on."""
        order = np.lexsort((-similarity, band))
        rank = np.arange(len(order)) - np.searchsorted(band[order], band[order])
        some = np.sort(order[rank < count])
        similarity, age = similarity[some], age[some]
        score = self.decay.scores(similarity, age)
        explores = self.decay.policy.explores(np.array(begin))
        best = np.argsort(-(similarity if explores else score), kind="stable")[:count]
        bias = (score - similarity)[best]
        return some[best], dataclasses.replace(self, age=tuple(age[best].tolist()), bias=tuple(bias.tolist()))

    def learn(self, logits: Tensor, votes: Tensor, targets: Tensor, vocabulary: int) -> Faded:
        """The stride is over. logits [n, H, m, block] of its queries and the tokens of the blocks found; `votes`
        [m, block]: the token that each speaks for, -1 if it has none; targets [n]: what came after the queries.

        All heads and tokens vote by their logits; a block's tokens are of one age, so its sums will do.
        """
        over = dataclasses.replace(self, age=(), bias=())
        known = (targets >= 0).tolist()
        if not self.age or not any(known):
            return over
        logits, targets = logits[known].detach().double(), targets[known]
        hit = (votes == targets[:, None, None])[:, None]
        miss = (~hit & (votes >= 0)).expand_as(logits)
        sums = [logits.masked_fill(~mask, -torch.inf).logsumexp((1, 3)).cpu().numpy() for mask in (hit, miss)]
        tokens = np.repeat([1, 0], len(votes))
        losses = rate_losses(
            np.concatenate(sums, 1),
            np.tile(self.age, 2),
            tokens,
            np.ones(len(targets), np.int64),
            np.full(len(targets), -np.log(vocabulary)),
            self.decay.policy.half_lives,
        )
        return dataclasses.replace(over, decay=self.decay.update(losses.sum(0, keepdims=True))[0])

    def only(self, there: Sequence[bool]) -> Faded:
        """When of the blocks found only some are still there."""
        age, bias = (tuple(itertools.compress(z, there)) for z in (self.age, self.bias))
        return dataclasses.replace(self, age=age, bias=bias)

    def to_dict(self) -> dict[str, Any]:
        return {"decay": self.decay.to_dict(), "age": self.age, "bias": self.bias, "origin": self.origin}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Faded:
        """The inverse, exactly. Raises StateError for what is none of its work."""
        try:
            age, bias = (tuple(map(float, fields[name])) for name in ("age", "bias"))
            return cls(Decay.from_dict(fields["decay"]), age, bias, int(fields["origin"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"what was saved of decay is damaged ({error}); start anew") from error


def biased_queries(q: Tensor) -> Tensor:
    """Queries [..., P] made wider, so that their logits with `biased_keys` are those of before and the bias."""
    wide = q.shape[-1] + LANES
    q = torch.nn.functional.pad(q * (wide / q.shape[-1]) ** 0.5, (0, LANES))
    q[..., -1] = wide**0.5
    return q


def biased_keys(k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Keys [..., heads, P] made wider; bias [...]: what the logits of each get, None for nothing."""
    k = torch.nn.functional.pad(k, (0, LANES))
    if bias is not None:
        k[..., -1] = bias[..., None].to(k.dtype)
    return k
