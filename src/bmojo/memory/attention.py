"""Which stored tokens are attended to while text is generated: for citations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bmojo.memory.engines import Block

EDGE = 0.1  # a span ends where a token got less of the attention than this share of the most that one got


class Span(NamedTuple):
    """`tokens` of `source` from position `start` up to `end`; weight: their share of the attention to stored text."""

    source: str
    start: int
    end: int
    tokens: np.ndarray
    weight: float


class Attention:
    """The weights of the softmax that generated tokens gave to stored ones, summed over tokens, the mean over heads and
    layers. `total` is their sum, `tokens` how many were generated."""

    def __init__(self) -> None:
        self.tokens, self.total = 0, 0.0
        self._blocks: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def add(self, blocks: list[Block], weights: np.ndarray) -> None:
        """Of one generated token and layer: weights [heads, blocks, block]."""
        self.total += float(weights.mean(0).sum())
        for block, mine in zip(blocks, weights.mean(0), strict=False):
            empty = block.tokens, np.zeros(len(mine))
            self._blocks.setdefault((block.source, block.start), empty)[1][:] += mine

    def spans(self, count: int = 5) -> list[Span]:
        """The `count` spans of most weight, each of one block, from its first to its last token attended to."""
        found = []
        for (source, start), (tokens, sums) in self._blocks.items():
            sums = sums[: len(tokens)]
            seen = np.flatnonzero(sums >= EDGE * sums.max())
            first, last = int(seen[0]), int(seen[-1]) + 1
            weight = float(sums[first:last].sum()) / max(self.total, 1e-30)
            found.append(Span(source, start + first, start + last, tokens[first:last], weight))
        return sorted(found, key=lambda span: -span.weight)[:count]
