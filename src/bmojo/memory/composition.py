"""One memory out of those of several documents, as if they had been read one after the other, without reading them.

A fading memory is an affine map of what came before: after document v it is h(u.v) = A(v) h(u) + h(v), with h(v) what
v leaves in the empty memory and A(v) its transition, the product of its decays. `MemoryState.tracked` keeps A beside h.

| `order` | fading memory | cost for K documents |
| --- | --- | --- |
| "given" | of the documents in this order | K |
| "cyclic" | the mean over the K rotations of an order (PICASO-R) | 2 K, by prefixes and suffixes |
| "all" | the mean over all K! orders (PICASO-S) | K^2 / 2 where A is diagonal; gdn: K 2^(K-1), at most 8 documents |

What can't be averaged follows an order: the given one, or, for "cyclic" and "all", that of the documents' digests; both
are thus the same whatever order the documents come in. In this order, with every document behind the one before:

- positions go on through all documents; the state has read as many tokens as all of them together, and goes on in the
  document id of the last;
- window, fading tokens and the tails of convolutions hold the last tokens of all, turned to their new positions;
- the eidetic set is the best E of all documents' sets, by score and age. Tokens of an unfinished chunk compete for it
  where that chunk is now complete, and wait in `pending` where not;
- the statistics of the innovation tests `rls` and `ema` fade too, by their forgetting rate to the number of tokens.

What is exact: the algebra. The composed state is that of one reading of all documents in this order, except that
every document was read as the first: its short convolutions start empty, its innovations are those of a reader who
knew nothing, and every layer above the first, and every fading token, was made without the documents before. So for
one layer of ssd, gdn or s6 it is exactly the reading in which the convolution's tail is emptied between documents; for
deep models it is PICASO's approximation.
Source: Liu et al. 2025, PICASO, arXiv 2502.17605.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import StateError, nearest
from bmojo.memory.digest import digest
from bmojo.memory.eidetic import keep_best
from bmojo.memory.state import MemoryState, require_same
from bmojo.ops.innovation import rls_prior
from bmojo.ops.numerics import widest
from bmojo.ops.rope import rope_table, rotate

ORDERS = ("given", "cyclic", "all")
MOST_IN_ALL_ORDERS = 8  # documents whose transitions do not commute

Map = tuple[Tensor, Tensor]  # A (its log, or a matrix) and h of the map x -> A x + h
Layer = dict[str, Tensor]


def compose(states: Sequence[MemoryState], order: str = "given") -> MemoryState:
    """The memory of all documents whose memories are given, each read from `model.empty_state().tracked()`.

    Every row of the batch is composed by itself. The result is tracked: it can be composed again, and in order "given"
    it is the same however documents are grouped. Raises StateError for states of other models, batch sizes or dtypes,
    for states that are not tracked, for layers that keep the whole past, and for what `order` can't do.
    What the savers noted beside the states is left behind.
    """
    if not states or not states[0].batch_size:
        raise StateError("there is nothing to compose: give at least one state, of at least one row")
    if order not in ORDERS:
        raise StateError(f"unknown order {order!r}; {nearest(order, ORDERS)}")
    config = states[0].config
    for i, kind in enumerate(config.kinds):
        if kind != "ssm" and config.window_of(kind) is None:
            raise StateError(
                f"layer {i} ({kind}) keeps the whole past, which does not compose; use a model whose layers all have a "
                "window or an SSM"
            )
        if config.parts(kind).ssm and not all("transition" in state.layers[i] for state in states):
            raise StateError(
                f"layer {i} ({kind}) has no transition to compose with; read from model.empty_state().tracked()"
            )
    for state in states:
        require_same(state.config, config)
        if (ours := _make(state)) != _make(states[0]):
            raise StateError(
                f"states must have one batch size, device and dtype, got {_make(states[0])} and {ours}; "
                "use state.select or state.to"
            )
    with torch.autocast(states[0].position.device.type, enabled=False):
        rows = [_compose_row([_row(state, row) for state in states], order) for row in range(states[0].batch_size)]
    return MemoryState.cat(rows)


def _make(state: MemoryState) -> tuple[int, str, str]:
    verbatim = (tensor for name, tensor in state.layers[0].items() if name in ("k", "ssm_conv"))
    return state.batch_size, str(state.position.device), str(next(verbatim).dtype)


# the algebra of fading memories
def then(first: Map, second: Map, *, matrix: bool) -> Map:
    """The map of two documents, read in this order."""
    (A, h), (B, g) = first, second
    return (B @ A, B @ h + g) if matrix else (A + B, B.exp() * h + g)


def in_order(maps: Sequence[Map], *, matrix: bool) -> Map:
    return reduce(lambda first, second: then(first, second, matrix=matrix), maps)


def mean_of_rotations(maps: Sequence[Map], *, matrix: bool) -> Map:
    """The mean map of the orders i ... K-1 0 ... i-1: that of i ... K-1, then that of 0 ... i-1."""
    before, after = [maps[0]], [maps[-1]]
    for first, last in zip(maps[1:], maps[-2::-1], strict=True):
        before.append(then(before[-1], first, matrix=matrix))
        after.append(then(last, after[-1], matrix=matrix))
    rotations = [before[-1]]
    rotations += [then(a, b, matrix=matrix) for a, b in zip(after[:-1], reversed(before[:-1]), strict=True)]
    return _mean(rotations)


def mean_of_orders(maps: Sequence[Map], *, matrix: bool) -> Map:
    """The mean map of all K! orders.

    Document i counts with the mean product of those behind it: of the m! (K-1-m)! orders that have a set of m behind,

        c_i = (1/K) sum_m e_m(A_j, j != i) / C(K-1, m) = integral over t in [0, 1] of prod_{j != i} (1 - t + t A_j)

    with e_m the elementary symmetric polynomials: 1 / (K C(K-1, m)) is the integral of t^m (1-t)^(K-1-m). Gauss'
    quadrature at K/2 points is exact for a polynomial of this degree, and all its terms are positive.
    Matrices do not commute: the mean of a set S is the mean over who comes last, A_j mean(S - j) + h_j.
    """
    return _mean_of_sets(maps) if matrix else _mean_by_quadrature(maps)


def _mean_by_quadrature(maps: Sequence[Map]) -> Map:
    log, h = (torch.stack(part) for part in zip(*maps, strict=True))
    points, weights = np.polynomial.legendre.leggauss(-(-len(maps) // 2))
    shape = (-1, *(1,) * log.ndim)
    t, w = (torch.from_numpy(z).to(widest(log)).view(shape) / 2 for z in (points + 1, weights))
    others = 1 + t * widest(log).expm1()  # [points, documents, ...]
    one = torch.ones_like(others[:, :1])
    before = torch.cat((one, others[:, :-1]), 1).cumprod(1)
    after = torch.cat((others[:, 1:], one), 1).flip(1).cumprod(1).flip(1)
    return log.sum(0), ((w * before * after).sum(0).to(h.dtype) * h).sum(0)


def _mean_of_sets(maps: Sequence[Map]) -> Map:
    means: dict[int, Map] = {1 << i: one for i, one in enumerate(maps)}
    for size in range(2, len(maps) + 1):
        larger: dict[int, Map] = {}
        for chosen in (c for c in range(1 << len(maps)) if c.bit_count() == size):
            last = [i for i in range(len(maps)) if chosen >> i & 1]
            larger[chosen] = _mean([then(means[chosen ^ 1 << i], maps[i], matrix=True) for i in last])
        means = larger
    (mean,) = means.values()
    return mean


def _mean(maps: Sequence[Map]) -> Map:
    A, h = (torch.stack(part).mean(0) for part in zip(*maps, strict=True))
    return A, h


AVERAGES = {"given": in_order, "cyclic": mean_of_rotations, "all": mean_of_orders}


# the other memories, of one row
def _row(state: MemoryState, row: int) -> MemoryState:
    return state.map(lambda tensor: tensor[row : row + 1])


def _compose_row(states: list[MemoryState], order: str) -> MemoryState:
    states = [state for state in states if int(state.position)] or states[:1]
    if len(states) == 1:
        return states[0]
    config = states[0].config
    if order != "given":
        states = sorted(states, key=_digest)
    lengths = [int(state.position) for state in states]
    _check_order(config, lengths, order)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    layers = (
        _Documents(config, kind, documents, lengths, starts, order).compose()
        for kind, documents in zip(config.kinds, zip(*(state.layers for state in states), strict=True), strict=True)
    )
    return MemoryState(config, tuple(layers))


def _digest(state: MemoryState) -> str:
    return digest({f"{i}.{name}": tensor for i, layer in enumerate(state.layers) for name, tensor in layer.items()})


def _check_order(config: ModelConfig, lengths: list[int], order: str) -> None:
    parts = [config.parts(kind) for kind in config.kinds]
    matrices = config.ssm == "gdn" and any(part.ssm for part in parts)
    if order == "all" and matrices and len(lengths) > MOST_IN_ALL_ORDERS:
        raise StateError(
            f"order 'all' takes at most {MOST_IN_ALL_ORDERS} documents of a gdn model, whose transitions do not "
            f"commute, got {len(lengths)}; use order='cyclic'"
        )
    ragged = [length for length in lengths if length % config.chunk_size]
    if ragged and config.fading_stride > 1 and any(part.fading for part in parts):
        raise StateError(
            f"fading='summary' composes documents of whole chunks ({config.chunk_size} tokens), got one of "
            f"{ragged[0]}; cut it, or fill its last chunk"
        )


@dataclass(frozen=True)
class _Documents:
    """What a layer keeps of documents of `lengths` tokens, to stand at positions `starts` on; one row."""

    config: ModelConfig
    kind: str
    layers: tuple[Layer, ...]
    lengths: list[int]
    starts: list[int]
    order: str

    @property
    def total(self) -> int:
        return self.starts[-1] + self.lengths[-1]

    @property
    def begun(self) -> int:
        """The position where the chunk in progress began."""
        return self.total - self.total % self.config.chunk_size

    def compose(self) -> Layer:
        last, stride = self.layers[-1], self.config.fading_stride
        new = {"position": torch.full_like(last["position"], self.total), "document": last["document"]}
        for name in last:
            match name:
                case "ssm":
                    maps = [(layer["transition"], layer["ssm"]) for layer in self.layers]
                    new["transition"], new["ssm"] = AVERAGES[self.order](maps, matrix=self.config.ssm == "gdn")
                case "ssm_conv" | "conv":
                    new[name] = self._tail(name)
                case "k" | "v":
                    new[name] = self._ring(name, 1)
                case "fading_k" | "fading_v":
                    new[name] = self._ring(name, stride)
                case "slot_score":
                    new |= self._slots()
                case "pending":
                    new[name] = self._pending()
                case "rls_A":
                    new[name] = self._forgotten(name)
                    new["rls_M"] = rls_prior(new[name], self.config.innovation_forgetting)
                case "ema":
                    new[name] = self._forgotten(name)
                case "last_y":
                    new[name] = last[name]
        return {name: new[name] for name in last}

    def _forgotten(self, name: str) -> Tensor:
        rate = math.log(self.config.innovation_forgetting)
        maps = [
            (torch.full_like(layer[name], rate * length), layer[name])
            for layer, length in zip(self.layers, self.lengths, strict=True)
        ]
        return AVERAGES[self.order](maps, matrix=False)[1]

    def _tail(self, name: str) -> Tensor:
        """The last inputs of all documents, zero before the first."""
        lags = self.layers[-1][name].shape[1]
        inputs = torch.cat(
            [layer[name][:, max(0, lags - n) :] for layer, n in zip(self.layers, self.lengths, strict=True)], 1
        )
        return F.pad(inputs, (0, 0, lags, 0))[:, inputs.shape[1] :]

    def _ring(self, name: str, stride: int) -> Tensor:
        """The newest entries of all documents, one for `stride` tokens, at their number modulo the ring's size."""
        ring = torch.zeros_like(self.layers[-1][name])
        room = size = ring.shape[1]
        for layer, length, start in zip(self.layers[::-1], self.lengths[::-1], self.starts[::-1], strict=True):
            if not room:
                break
            entries = length // stride
            number = torch.arange(entries - min(room, entries), entries, device=ring.device)
            rows = layer[name][:, number % size]
            ring[:, (number + start // stride) % size] = self._turned(rows, start) if name.endswith("k") else rows
            room -= len(number)
        return ring

    def _slots(self) -> Layer:
        """The best of all documents' slots and of the tokens that waited for the end of a chunk that is now behind."""
        compact, chunk = self.config.positions == "compact", self.config.chunk_size
        window = self.config.window
        assert window is not None
        found: dict[str, list[Tensor]] = {"slot_k": [], "slot_v": [], "slot_score": [], "slot_position": []}
        for layer, length, start in zip(self.layers, self.lengths, self.starts, strict=True):
            waited = torch.arange(length - length % chunk, length, device=layer["k"].device)
            waited = waited[waited + start < self.begun]
            k = layer["k"][:, waited % window]
            k = torch.cat((layer["slot_k"], self._turned(k, -waited) if compact else k), 1)
            position = torch.cat((layer["slot_position"], waited[None]), 1)
            found["slot_k"].append(k if compact else self._turned(k, start))
            found["slot_v"].append(torch.cat((layer["slot_v"], layer["v"][:, waited % window]), 1))
            found["slot_score"].append(torch.cat((layer["slot_score"], layer["pending"][:, waited % chunk]), 1))
            found["slot_position"].append(torch.where(position < 0, -1, position + start))
        all_of = {name: torch.cat(parts, 1) for name, parts in found.items()}
        newest_first = all_of["slot_position"][0].argsort(descending=True, stable=True)
        all_of = {name: tensor[:, newest_first] for name, tensor in all_of.items()}
        order, is_one = keep_best(
            all_of["slot_score"],
            all_of["slot_position"],
            torch.full_like(all_of["slot_position"][:, 0], self.total),
            self.config.eidetic_slots,
            decay=self.config.eidetic_decay,
            threshold=self.config.eidetic_threshold,
        )
        kept = {name: tensor[:, order[0]] for name, tensor in all_of.items()}
        kept["slot_position"] = kept["slot_position"].masked_fill(~is_one, -1)
        return kept

    def _pending(self) -> Tensor:
        """Scores of the chunk in progress; -1, below every threshold, for a token that has competed already."""
        chunk = self.config.chunk_size
        pending = torch.zeros_like(self.layers[-1]["pending"])
        for layer, length, start in zip(self.layers, self.lengths, self.starts, strict=True):
            here = torch.arange(min(max(0, self.begun - start), length), length, device=pending.device)
            waits = here >= length - length % chunk
            pending[:, here + start - self.begun] = layer["pending"][:, here % chunk].masked_fill(~waits, -1)
        return pending

    def _turned(self, k: Tensor, by: int | Tensor) -> Tensor:
        """Keys [1, n, kv_heads, head_dim], turned `by` positions further."""
        by = torch.full(k.shape[1:2], by, device=k.device) if isinstance(by, int) else by
        return rotate(k, rope_table(by[None], self.config.head_dim, self.config.rope_theta, k.dtype))
