"""In-storage memory: a layer hands the tokens that it has read to a store, in blocks, and reads those again that are
found for it, in the same softmax as its other memories.

    position   0 ........................................ s ............ i
    blocks     [0, 64) [64, 128) ...                      |
    stride                                        (s-n, s] ask
                                                          [s ... s+stride) read what was found for this stride

A *block* is `storage_block` consecutive tokens of a source (a stream, a document), from a multiple of that on; it is
handed over when its last token is read. A *stride* is `storage_stride` queries that share what was found: for those
from s on, the `storage_blocks` blocks of highest score among

- the source's own blocks that ended before s and of which some token is out of the window by the end of the stride;
- all blocks of other sources in the store, up to the generation that is pinned.

Query i then sees the tokens of these blocks: of its own source those p <= i - window that are not in an eidetic slot
(so no token is seen twice and, as a block is no longer than the window, none falls between), of others all.

Positions. Keys are kept before their rotation. With positions "compact" every found block stands at the same place,
right before all else that a query of the chunk can reach: place j of a block of n at start - reach - n + j, where reach
covers window, fading span and eidetic slots. What a block weighs then depends neither on how many others were found
nor on its rank. With "true" positions a source's own blocks stand where they were, others as with "compact".

What a block is found by are `storage_keys` of its keys, of the tokens of highest innovation score (that of admission to
the eidetic slots; without such a test the means of equal parts), each turned by its place j. The first token of the
stride and the `storage_queries` - 1 before it ask, turned by their distance to where a found block stands. So the inner
product of the two, over sqrt(head_dim), is the sum over heads of the logits with which token j would be attended to,
and a block's score is the largest of them, over the tokens that ask and its keys.

In training there is no store: rows read the earlier blocks of their own call, and with `distractors` these compete
with the earlier blocks of all other rows, as in the Focused Transformer (Tworkowski et al. 2023, arXiv 2307.03170).
There a block is found by all of its keys, and what is attended to in it teaches admission, so that later the few keys
by which it is found are those that are looked for. Gradients flow through the keys and values read, not through the
choice. After Span-Expanded Attention (Nunez et al.
2024, arXiv 2412.13328), whose code is not public, InfLLM (arXiv 2402.04617; keys that stand for a block) and
Memorizing Transformers (arXiv 2203.08913).

Legend: B rows, L slots, W window, C chunk, G strides (L / stride), U places where a block may end, n tokens that ask,
r keys of a block, D = kv_heads * head_dim, M tokens found (storage_blocks * storage_block).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, StateError
from bmojo.memory.attention import Attention
from bmojo.memory.decay import Decay
from bmojo.memory.engines import Block
from bmojo.memory.engines.block import with_id
from bmojo.memory.faded import Faded, new_decay
from bmojo.memory.geometry import Geometry
from bmojo.memory.layout import Layout
from bmojo.memory.mark import Mark
from bmojo.memory.read import Slots
from bmojo.memory.step import Step
from bmojo.memory.store import Store
from bmojo.ops.attention import last_weights, put

NOWHERE = -(2**40)  # where a block of another source starts: no window hides it, and no slot holds it
BRANCH = "@branch-"
Rows = list[list[Block]]
Pin = tuple[int, int, tuple[int, ...]]
Aged = tuple[float, int, int, Block]  # similarity, age, band of age


class Own:
    """The blocks of one source and layer that its session keeps by itself, oldest first: those that the pinned
    generation of the store may lack."""

    def __init__(self, blocks: Sequence[Block] = ()) -> None:
        self.blocks = list(blocks)
        self._keys: np.ndarray | None = None

    def append(self, block: Block) -> None:
        self.blocks.append(block)
        self._keys = None

    def best(self, asking: np.ndarray, before: int, count: int, after: int = 0) -> list[tuple[float, Block]]:
        """The `count` blocks of highest score that start from `after` on and before `before`, for tokens asking [n, D],
        and any that equal the last."""
        if self._keys is None and self.blocks:
            self._keys = np.stack([block.keys for block in self.blocks]).astype(asking.dtype)
        since, until = (bisect.bisect_left(self.blocks, at, key=lambda block: block.start) for at in (after, before))
        if until <= since:
            return []
        assert self._keys is not None
        keys = self._keys[since:until]
        score = (asking @ keys.reshape(-1, keys.shape[-1]).T).reshape(len(asking), *keys.shape[:2]).max((0, 2))
        least = np.partition(score, -count)[-count] if len(score) > count else -np.inf
        best = np.flatnonzero(score >= least)
        return [(float(score[i]), self.blocks[since + i]) for i in best]

    def release(self, start: int) -> list[Block]:
        """Forget the blocks that start before `start`: those."""
        count = sum(block.start < start for block in self.blocks)
        gone, self.blocks = self.blocks[:count], self.blocks[count:]
        self._keys = None if gone else self._keys
        return gone


@dataclass
class Pool:
    """Blocks that may be found in a call: k, v [X, block, K, P], keys not turned; int64 [X]: `start` in its source,
    `owner`, the row whose source that is, -1 if it is another's, and `count` of its tokens."""

    k: Tensor
    v: Tensor
    start: Tensor
    owner: Tensor
    count: Tensor

    def join(self, other: Pool) -> Pool:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Pool(*(torch.cat(pair) for pair in pairs))


@dataclass
class Laid:
    """What was found, as decoding reads it: k, v [B, M, K, P], turned; the position of each token in its own source
    [B, M], far below 0 if in another; whether it may be seen; the newest position; with decay, the bias [B, M]."""

    k: Tensor
    v: Tensor
    position: Tensor
    seen: Tensor
    newest: int
    bias: Tensor | None = None


@dataclass
class Kept:
    """What a layer keeps between calls: rings of the tokens that ask [B, n, H * P] and of scores [B, block]; of each
    row, what was found for its stride, its own blocks, and, with decay, what it makes of them. With decay the ring of
    tokens that ask holds all of a stride: its predictions are what is learned from."""

    found: Rows
    own: list[Own]
    faded: list[Faded] = dataclasses.field(default_factory=list)
    asking: Tensor | None = None
    score: Tensor | None = None
    laid: Laid | None = None


class Storage:
    """The in-storage memory of a batch of streams (rows), for `model(tokens, state, storage=...)`.

    store         what blocks are handed to and found in, with those of others; None: the session keeps its own
    sources       the name of each row in the store
    distractors   for training: every row may find the blocks of all other rows of the call
    keep          False, for training: nothing outlasts the call
    write         False: nothing is handed to the store; the session keeps its own
    find          False: nothing is read from it; so what a document leaves there does not depend on what else it holds
    dtype         of what is stored. What is read again has been rounded to it, in the call that hands it over too, so
                  that any way of cutting a stream into calls gives the same.

    A stream sees its own blocks at once. Of others it sees those up to `generation`, which moves on by itself, at the
    start of a call, whenever the store has published a newer one; `record` lists when, if a list is given, as (tokens
    read, generation, and for each row the position before which its own blocks are from then on found in the store).
    With `replay`, such a list, it moves just as it did then, and nothing is written: the same calls give the same
    logits.
    What is deleted from the store is gone from replays too.

    `decay`: what was stored counts less as it grows older, by half-lives that are learned from prediction, each row and
    layer its own (`bmojo.memory.faded`, docs/decay.md). True begins with what the store has learned, which a session
    that hands over to it adds to; a replay takes the `Decay` that the session began with. Ages are in blocks: of its
    own past, of what the row has read since; of others, of what a layer of the store has been given since or, if that
    is more, what it had been given before the row began and what the row has read. A mark brings its own weights.

    `attention`, if one is given to it, notes what the tokens of decoding steps attend to.

    Raises ConfigError for a model without storage layers.
    """

    attention: Attention | None = None

    def __init__(
        self,
        config: ModelConfig,
        rows: int = 1,
        *,
        store: Store | None = None,
        sources: Sequence[str] | None = None,
        distractors: bool = False,
        keep: bool = True,
        dtype: torch.dtype = torch.float16,
        write: bool = True,
        find: bool = True,
        record: list[Pin] | None = None,
        replay: Sequence[Pin] | None = None,
        decay: bool | Decay = False,
    ) -> None:
        if not config.storage_layers:
            raise ConfigError(
                "the model has no layer with storage, expected storage_layers in its configuration; "
                "use model.with_settings(storage_layers=(-1,))"
            )
        if distractors and keep:
            raise ConfigError("distractors are the other rows of a call in training: use keep=False with them")
        self.config, self.store, self.dtype, self.distractors, self.keep = config, store, dtype, distractors, keep
        self.write, self.find = write and replay is None, find
        self.sources = [f"stream-{row}" for row in range(rows)] if sources is None else list(sources)
        if len(set(self.sources)) != rows:
            raise ConfigError(f"sources must be {rows} different names, one a row, got {self.sources}")
        self.ancestors: list[dict[str, int]] = [{} for _ in range(rows)]  # read by the row up to this position
        self.layers = {
            layer: Kept([[] for _ in range(rows)], [Own() for _ in range(rows)]) for layer in config.storage_layers
        }
        self.geometry = {layer: Geometry.of(config, layer) for layer in config.storage_layers}
        self.positions = [0] * rows
        self._handed = [0] * rows  # blocks handed over under the row's name
        self._trails: list[tuple[int, list[int]]] = [
            (0, []) for _ in range(rows)
        ]  # tokens read lately, from a position
        self._ids: dict[tuple[str, int, int], int] = {}  # what the store has called its own blocks
        self._deleted = {} if store is None else store.deleted  # what is gone of the blocks that the session holds
        self.read_tokens = 0
        self.replay = None if replay is None else list(replay)
        self.generation = -1
        self.record = record
        self.released: tuple[int, ...] = (0,) * rows
        self._tokens: Tensor | None = None  # [B, block] ring
        self._placed: Tensor | None = None  # [B, block + L] of the call
        if decay:
            if not keep:
                raise ConfigError("decay is learned from call to call, and nothing outlasts one with keep=False")
            if config.storage_stride > config.storage_block:
                raise ConfigError(
                    f"decay needs storage_stride to be at most storage_block ({config.storage_block}), "
                    f"got {config.storage_stride}"
                )
            for layer, kept in self.layers.items():
                begun = decay if isinstance(decay, Decay) else None if store is None else store.decay(layer)
                kept.faded = [Faded(begun or new_decay())] * rows

    @property
    def rows(self) -> int:
        return len(self.sources)

    @property
    def decays(self) -> bool:
        """Whether what is stored counts less as it grows older."""
        return any(kept.faded for kept in self.layers.values())

    @property
    def half_life(self) -> list[float]:
        """The metric `memory.half_life` of each row, in blocks, the least of its layers: see `Decay.half_life`. Empty
        without decay."""
        rows = zip(*(kept.faded for kept in self.layers.values()), strict=True)
        return [min(faded.decay.half_life for faded in row) for row in rows]

    # as a value
    def mark(self) -> Mark:
        """What the session is now; `back` and `restore` go there. No reading of the model changes it."""
        rings = {} if self._tokens is None else {"tokens": self._tokens.clone()}
        for layer, kept in self.layers.items():
            for name in ("asking", "score"):
                if (ring := getattr(kept, name)) is not None:
                    rings[f"{name}.{layer}"] = ring.clone()
        return Mark(
            sources=tuple(self.sources),
            ancestors=tuple(self.ancestors),
            positions=tuple(self.positions),
            handed=tuple(self._handed),
            released=self.released,
            generation=self.generation,
            rings=rings,
            found={layer: tuple(map(tuple, kept.found)) for layer, kept in self.layers.items()},
            own={layer: tuple(map(self._with_ids, kept.own)) for layer, kept in self.layers.items()},
            faded={layer: tuple(kept.faded) for layer, kept in self.layers.items() if kept.faded},
        )

    def settle(self) -> None:
        """Wait until the store has what was handed over; a mark made then tells all about it."""
        if self.store is not None and self.write:
            self.store.flush()

    def back(self, mark: Mark) -> None:
        """Go back to a mark of this session. What it reads again is not handed over twice; where it reads something
        else, the row goes on as a branch. Raises StateError if the mark is of other rows or layers."""
        if len(mark.sources) != self.rows or mark.own.keys() != self.layers.keys():
            raise StateError(
                f"the storage was marked with {len(mark.sources)} rows and layers {sorted(mark.own)}, this one has "
                f"{self.rows} rows and layers {sorted(self.layers)}"
            )
        for layer, g in self.geometry.items():
            asking, size = mark.rings.get(f"asking.{layer}"), g.ring(decays=bool(mark.faded))
            if asking is not None and asking.shape[1] != size:
                raise StateError(
                    f"the storage was marked with {asking.shape[1]} tokens that ask, this one has {size}; go on with "
                    "the same storage_queries (with decay, storage_stride too)"
                )
        self.sources, self.ancestors, self.positions = list(mark.sources), list(mark.ancestors), list(mark.positions)
        self._handed, self.released, self.generation = list(mark.handed), mark.released, mark.generation
        self._tokens = mark.rings["tokens"].clone() if "tokens" in mark.rings else None
        for layer, kept in self.layers.items():
            asking, score = (mark.rings.get(f"{name}.{layer}") for name in ("asking", "score"))
            kept.asking, kept.score = (None if ring is None else ring.clone() for ring in (asking, score))
            kept.found, kept.laid = list(map(list, mark.found[layer])), None
            kept.own = [Own(blocks) for blocks in mark.own[layer]]
            kept.faded = list(mark.faded.get(layer, ()))
            self._ids.update({_key(b): b.id for blocks in mark.own[layer] for b in blocks if b.id >= 0})
        if self.store is not None and self.write:
            for block in (b for kept in self.layers.values() for own in kept.own for b in own.blocks):
                if self._id(block) < 0:  # the mark was made before the writer told
                    self.store.put(block, self._told)
        self._drop(self._was_deleted)

    def restore(self, mark: Mark) -> None:
        """Go back to a mark, or on from one that was saved, to read whatever comes. Where the store has later blocks of
        a row's source, the row goes on as a branch, under another name: those are not its past."""
        self.back(mark)
        if self.store is None:
            return
        self.settle()
        get = self.store.get
        self._drop(lambda block: self._id(block) >= 0 and get(self._id(block)) is None)
        if not self.write:
            return
        self._branch([row for row, name in enumerate(self.sources) if self.store.count(name) != self._handed[row]])

    def fork(self, *, write: bool = True) -> Storage:
        """A second session that goes on from here. If it hands anything over, that is of another branch."""
        other = Storage(self.config, self.rows, store=self.store, dtype=self.dtype, write=write)
        self.settle()
        other.restore(self.mark())
        if write and self.store is not None:
            other._branch(range(self.rows))
        return other

    def _told(self, block: Block, number: int) -> None:
        """The store's writer, in its own thread: the block has been given this id."""
        self._ids[_key(block)] = number

    def _id(self, block: Block) -> int:
        """At least the id that the store has given it; -1: it doesn't have it yet."""
        return self._ids.get(_key(block), -1) if block.id < 0 else block.id

    def _with_ids(self, own: Own) -> tuple[Block, ...]:
        return tuple(with_id(block, self._id(block)) for block in own.blocks)

    def _was_deleted(self, block: Block) -> bool:
        assert self.store is not None
        return 0 <= self._id(block) <= self.store.deleted.get(block.source, -1)

    def _drop(self, gone: Callable[[Block], bool]) -> None:
        """Let go of the blocks, own or found, that are `gone` from the store."""
        if self.store is None:
            return
        self._deleted = self.store.deleted
        for kept in self.layers.values():
            there = [[not gone(block) for block in row] for row in kept.found]
            kept.found = [list(itertools.compress(*pair)) for pair in zip(kept.found, there, strict=True)]
            kept.faded = [faded.only(mine) for faded, mine in zip(kept.faded, there, strict=False)]
            kept.own = [Own([block for block in own.blocks if not gone(block)]) for own in kept.own]
            kept.laid = None

    def _follow(self, row: int, ids: list[int]) -> None:
        """The row reads `ids` next. It branches if the store was given blocks of what it read here before, and that was
        something else, or is no more known."""
        assert self.store is not None
        position, end = self.positions[row], self.store.end(self.sources[row])
        first, past = self._trails[row]
        at = position - first
        before = past[at : at + len(ids)] if at >= 0 else []
        count = min(len(ids), end - position)
        if count > 0 and before[:count] != ids[:count]:
            self._branch([row])
            past = past[: max(0, at)]
        if not 0 <= at <= len(past):
            first, past, at = position, [], 0
        past[at : at + len(ids)] = ids
        done = max(0, min(self.released[row], position) - first)
        self._trails[row] = first + done, past[done:]

    def _branch(self, rows: Iterable[int]) -> None:
        """Hand over under another name from now on."""
        for row in rows:
            name = self.sources[row]
            self.ancestors[row] = {**self.ancestors[row], name: self.positions[row]}
            self.sources[row] = f"{root(name)}{BRANCH}{secrets.token_hex(4)}"
            self._handed[row] = 0

    # what the model calls
    def begin(self, tokens: Tensor, at: Layout | Step) -> None:
        """A call on `tokens` [B, T], or on embeddings, which have no ids (-1), begins."""
        if tokens.shape[0] != self.rows:
            raise ConfigError(f"the storage has {self.rows} rows, the tokens {tokens.shape[0]}; they must be as many")
        if not self.keep:
            return
        if self.positions != at.positions:
            raise ConfigError(
                f"the storage has read {self.positions} tokens, the state {at.positions}; they go together: "
                "begin both anew, or restore both"
            )
        if isinstance(at, Layout) and at.packed:
            raise ConfigError("a stream with storage is one document; leave out document_ids")
        if self.store is not None and self.store.deleted is not self._deleted:
            self._drop(self._was_deleted)
        size = self.config.storage_block
        ids = tokens.long() if tokens.ndim == 2 else tokens.new_full(tokens.shape[:2], -1, dtype=torch.int64)
        if self.store is not None and self.write:
            mask = at.mask if isinstance(at, Layout) else None
            for row, mine in enumerate(ids):
                self._follow(row, (mine if mask is None else mine[mask[row]]).tolist())
        if isinstance(at, Step):
            ring = ids.new_full((self.rows, size), -1) if self._tokens is None else self._tokens
            self._tokens = put(ring, at.position % size, ids[:, 0])
            if self.attention is not None:
                self.attention.tokens += self.rows
            after = [position + 1 for position in at.positions]
        else:
            self._placed = at.history(self._tokens, at.place(ids), size)
            self._tokens = at.ring(self._placed, size)
            after = at.next_position.tolist()
        self._move(at)
        new = [position == 0 for position in self.positions]
        for kept in self.layers.values() if any(new) else ():
            kept.faded = [
                dataclasses.replace(faded, origin=self.generation) if is_new else faded
                for faded, is_new in zip(kept.faded, new, strict=False)
            ]
        self.positions = after
        self.read_tokens += tokens.shape[1]

    def read(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, held: Tensor | None, layout: Layout
    ) -> tuple[Slots, Tensor | None] | None:
        """What the queries q [B, L, H, P] of a call read from storage, if anything, and, with decay, the bias [B, N, E]
        of its logits; what they complete is handed over.

        k, v [B, W + L, K, P]: keys and values of the call behind those of the window before it, k turned by true
        positions, as q is; score [B, L] of admission, or None; held [B, N, E]: the positions in each chunk's slots.
        """
        g, kept = self.geometry[layer], self.layers[layer]
        device, row = q.device, torch.arange(q.shape[0], device=q.device)
        end = torch.arange(min(g.block, g.chunk), layout.slots + 1, min(g.block, g.chunk), device=device)
        first = layout.position[:, end - 1] + 1 - g.block  # [B, U] where a block would start
        done = layout.valid[:, end - 1] & (first % g.block == 0)
        place = end[:, None] - g.block + torch.arange(g.block, device=device)  # [U, block] its slots
        position, _ = layout.sources(g.window)
        k, v = self._rounded(g.turn(k, -position))[:, g.window + place], self._rounded(v)[:, g.window + place]
        scores = None if score is None else layout.history(kept.score, score, g.block)
        of = None if scores is None else scores[:, g.block + place]
        keys = self._rounded(g.found_by(k, of)) if self.keep else g.turned(k)  # [B, U, r, D]
        parts = k, v, first, row[:, None].expand_as(first), torch.full_like(first, g.block)
        near = Pool(*(z.flatten(0, 1) for z in parts))

        ring = g.ring(decays=self.decays)
        asked = layout.history(kept.asking, q.flatten(2), ring)
        if self.keep:
            kept.asking, kept.laid = layout.ring(asked, ring), None
            kept.score = None if scores is None else layout.ring(scores, g.block)
        if not self.find:
            if self.keep:
                self._made(layer, near, keys, scores, place, done)
            return None

        slot = torch.arange(0, layout.slots, g.stride, device=device)  # where strides begin
        begin = layout.position[:, :: g.stride]
        some = layout.valid.unflatten(1, (len(slot), g.stride)).any(2)
        fresh = some & (begin > 0) & (slot >= layout.offset[:, None])  # the others go on with what was found before
        asking = asked[:, ring - g.queries + 1 :].unfold(1, g.queries, g.stride).transpose(2, 3)
        before = begin[..., None] - torch.arange(g.queries - 1, -1, -1, device=device)
        asking = torch.where((before >= 0)[..., None], asking, asking[:, :, -1:])  # at the start there are fewer
        asking = g.asking(asking.unflatten(-1, q.shape[2:]), begin).detach()  # [B, G, n, D]

        rows = keys.detach()[:, None] if self.distractors else keys.detach()[None]  # one at a time, for their memory
        value = torch.stack(
            [torch.einsum("bgnd,burd->bgunr", asking, z.expand(len(row), -1, -1, -1)).amax((-1, -2)) for z in rows], 2
        )  # [B, G, B or 1, U]
        segment = layout.segment_of_slot
        past = done[:, None] & (end <= slot[:, None])  # [B, G, U]
        seen = past & (segment[:, None, end - 1] == segment[:, slot, None])
        seen = (seen & (first[:, None] < (begin + g.stride - g.window)[..., None]))[:, :, None]
        if self.distractors:  # what other rows have read later may know, by way of layers below, of this row's future
            seen = torch.where((row[:, None] == row)[:, None, :, None], seen, past.transpose(0, 1))
        value = value.masked_fill(~(seen & fresh[..., None, None]), -torch.inf).flatten(2)
        bias: Tensor | None = None
        blocks: list[tuple[int, Block]] = []
        if kept.faded:
            due = [(int(b), int(i)) for b, i in fresh.nonzero()]
            aged = self._aged(layer, [(b, int(begin[b, i])) for b, i in due], asking[fresh])
            made = self._made(layer, near, keys, scores, place, done)
            queries = asked[:, ring:].unflatten(-1, q.shape[2:])
            others = dict(zip(due, aged, strict=True))
            blocks, value, entry, bias = self._choose(layer, queries, value, others, begin, made, layout)
        else:
            entry = torch.arange(value.shape[2], device=device).expand_as(value)
            entry = entry if self.distractors else entry + (row * len(end))[:, None, None]
            value, entry = value.flip(2), entry.flip(2)  # of the same value, the newest first
            if self.keep:
                blocks, more, which = self._far(layer, asking, begin, fresh, layout)
                value, entry = torch.cat((value, more), 2), torch.cat((entry, which + len(near.start)), 2)
            value, order = torch.sort(value, dim=2, descending=True, stable=True)
            value, entry = (_first(z, g.blocks, fill) for z, fill in ((value, -torch.inf), (entry.gather(2, order), 0)))

        pool = near.join(self._pool(blocks, g, k)) if blocks else near
        inner = torch.arange(g.block, device=device)
        start = torch.where(pool.owner[entry] == row[:, None, None], pool.start[entry], NOWHERE)
        own = start[..., None] + inner  # [B, G, blocks, block] positions in the row's own source
        visible = (value > -torch.inf)[..., None] & (inner < pool.count[entry][..., None])
        if held is not None:
            slots = held.repeat_interleave(g.chunk // g.stride, 1)[:, :, None, None]
            visible = visible & ~(own[..., None] == slots).any(-1)
        opens = slot[:, None, None]
        from_slot = torch.maximum(opens, own + (g.window - begin + slot)[..., None, None])
        last = (opens + g.stride - 1).masked_fill(~visible, -1)
        k = g.turn(pool.k[entry], g.stands(begin[..., None], start))
        if self.keep and not kept.faded:
            made = self._made(layer, near, keys, scores, place, done)
            self._remember(kept, made, blocks, entry, value, layout)
        token = None if self.keep else entry[..., None] // len(end) * layout.slots + place[entry % len(end)]
        shape = (q.shape[0], layout.chunks, -1)
        k, v, from_slot, last = (z.reshape(*shape, *z.shape[4:]) for z in (k, pool.v[entry], from_slot, last))
        stored = Slots(k, v, from_slot, last, None if token is None else token.reshape(shape))
        return stored, None if bias is None else bias.repeat_interleave(g.block, 2).reshape(shape)

    def step(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, held: Tensor | None, at: Step
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """`read` for one token a row: k, v [B, M, K, P], the mask [B, M] of what its query q [B, H, P] sees, and the
        bias [B, M], None without decay; None if nothing was found. k, v [B, W, K, P]: the window's rings with this
        token; score [B]; held [B, E]."""
        g, kept = self.geometry[layer], self.layers[layer]
        position = at.positions
        if kept.asking is None:
            kept.asking = q.new_zeros(self.rows, g.ring(decays=self.decays), q[0].numel())
        if kept.score is None and score is not None:
            kept.score = score.new_zeros(self.rows, g.block)
        if kept.faded or any(-p % g.stride < g.queries for p in position):  # else nobody will ask for what it held
            kept.asking = put(kept.asking, at.position % kept.asking.shape[1], q.flatten(1))
        due = [row for row, p in enumerate(position) if p % g.stride == 0 and self.find]
        if due:
            self._find_due(layer, due, position, q)
        if kept.laid is None:
            kept.laid = self._lay(layer, at, held, q)
        if score is not None:
            kept.score = put(kept.score, at.position % g.block, score)
        for row, p in enumerate(position):
            if (p + 1) % g.block == 0:
                self._make(layer, row, p, k, v)
            if kept.faded and (p + 1) % g.stride == 0:
                assert self._tokens is not None
                begin = p + 1 - g.stride
                places = torch.arange(begin, p + 1, device=q.device)
                tokens, asked = self._tokens[row, places % g.block], kept.asking[row, places % kept.asking.shape[1]]
                self._learn(layer, row, begin, asked.view(-1, *q.shape[1:]), tokens)
        laid = kept.laid
        if not laid.k.shape[1]:
            return None
        seen = laid.seen
        if laid.newest > min(position) - g.window:
            seen = seen & (laid.position <= (at.position - g.window)[:, None])
        return laid.k, laid.v, seen, laid.bias

    def attended(self, layer: int, q: Tensor, keys: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Note the weights that the queries q [B, H, P] of a step give to the last of the sets of keys, those found."""
        assert self.attention is not None
        weights = last_weights(q, keys, masks) / len(self.layers)
        for found, mine in zip(self.layers[layer].found, weights, strict=True):
            self.attention.add(found, mine.unflatten(-1, (-1, self.config.storage_block)).double().cpu().numpy())

    def finish(self, state: Sequence[dict[str, Tensor]]) -> None:
        """A document is at its end: hand over what is left of it, less than a block. `state`: the layers' states."""
        size = self.config.storage_block
        for layer in self.layers:
            k, v = state[layer]["k"], state[layer]["v"]
            for row, position in enumerate(self.positions):
                if position % size:
                    self._make(layer, row, position - 1, k, v)
        for source in self.sources if self.store is not None else ():
            self.store.finish(source)  # type: ignore[union-attr]

    # finding
    def _far(
        self, layer: int, asking: Tensor, begin: Tensor, fresh: Tensor, layout: Layout
    ) -> tuple[list[tuple[int, Block]], Tensor, Tensor]:
        """Candidates from outside the call: (row, block), and for every stride the score and number [B, G, n] of those
        that were found for it now, or, where the call began inside a stride, for that one before."""
        g, kept = self.geometry[layer], self.layers[layer]
        pairs = [(int(b), int(i)) for b, i in fresh.nonzero()]
        starts = [(row, int(begin[row, i])) for row, i in pairs]
        results = self._search(layer, starts, asking[fresh])
        for row, offset in enumerate(layout.offset.tolist()):
            if offset % g.stride and kept.found[row]:
                pairs.append((row, offset // g.stride))
                results.append([(np.inf, block) for block in kept.found[row]])
        most = max(map(len, results), default=0)
        value = asking.new_full((*begin.shape, most), -torch.inf)
        which = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
        blocks: list[tuple[int, Block]] = []
        numbers: dict[tuple[int, int], int] = {}
        for (row, i), found in zip(pairs, results, strict=True):
            for rank, (score, block) in enumerate(found):
                number = numbers.setdefault((row, id(block)), len(blocks))
                if number == len(blocks):
                    blocks.append((row, block))
                value[row, i, rank], which[row, i, rank] = score, number
        return blocks, value, which

    def _search(
        self, layer: int, strides: Sequence[tuple[int, int]], asking: Tensor, ages: tuple[int, int | None] = (0, None)
    ) -> list[list[tuple[float, Block]]]:
        """For each (row, begin), with tokens asking [m, n, D]: the blocks of highest score, best first, of those as old
        as `ages`, in blocks: from the first up to, not including, the second."""
        if not strides:
            return []
        g, own, asks = self.geometry[layer], self.layers[layer].own, _numpy(asking)
        newer, older = ages
        mine: list[list[tuple[float, int, int, Block | None]]] = []
        for (row, begin), each in zip(strides, asks, strict=True):
            before = min(begin + g.stride - g.window, begin - newer * g.block + 1)
            kept = own[row].best(each, before, g.blocks, 0 if older is None else begin - older * g.block + 1)
            mine.append([(score, 1, block.start, block) for score, block in kept])
        # what is handed over is in the store and kept here, too
        want = g.blocks + (max(len(own[row].blocks) for row, _ in strides) if self.write else 0)
        newest = self.generation - newer * len(self.layers)
        after = -1 if older is None else max(-1, self.generation - older * len(self.layers))
        while True:
            theirs = [[]] * len(mine) if self.store is None else self.store.search(layer, asks, want, newest, after)
            results = []
            for (row, _), own_ones, found in zip(strides, mine, theirs, strict=True):
                ranked = sorted([*own_ones, *((s, 0, n, None) for s, n in found)], key=lambda c: c[:3], reverse=True)
                if self.store is not None:
                    self.store.fetch(number for _, number in found[: g.blocks])
                results.append(self._best(ranked, row, g.blocks))
            if all(
                len(found) < want or (len(best) == g.blocks and best[-1][0] >= found[-1][0])
                for found, best in zip(theirs, results, strict=True)
            ):
                return results
            want *= 2  # much of what was found is of other branches of these streams

    # with decay
    def _aged(self, layer: int, strides: Sequence[tuple[int, int]], asking: Tensor) -> list[list[Aged]]:
        """For each (row, begin), with tokens asking [m, n, D]: (similarity, age, band, block) of the most similar of
        each band of age."""
        heads = self.config.num_heads
        found: list[list[Aged]] = [[] for _ in strides]
        lives = sorted(self.layers[layer].faded[0].decay.policy.half_lives)
        newer = [0, *(int(h) for h in lives if np.isfinite(h))]
        for band, ages in enumerate(zip(newer, [*newer[1:], None], strict=True)):
            each = self._search(layer, strides, asking, ages)
            for (row, begin), some, mine in zip(strides, each, found, strict=True):
                mine += [(score / heads, self._age(row, begin, block), band, block) for score, block in some]
        return found

    def _age(self, row: int, begin: int, block: Block) -> int:
        size = self.config.storage_block
        if self._owns(row, block):
            return (begin - block.start) // size
        since = block.id - self.layers[block.layer].faded[row].origin
        return max((self.generation - block.id) // len(self.layers), begin // size - since // len(self.layers))

    def _rank(self, layer: int, row: int, begin: int, candidates: Sequence[Aged]) -> None:
        """Find what the stride from `begin` on reads, among candidates, of equally similar ones the newest first."""
        kept = self.layers[layer]
        kept.found[row], kept.faded[row] = [], dataclasses.replace(kept.faded[row], age=(), bias=())
        if candidates:
            similarity, age, band, blocks = zip(*candidates, strict=True)
            each = np.array(similarity), np.array(age), np.array(band)
            index, kept.faded[row] = kept.faded[row].choose(*each, self.config.storage_blocks, begin)
            kept.found[row] = [blocks[n] for n in index]

    def _learn(self, layer: int, row: int, begin: int, q: Tensor, tokens: Tensor) -> None:
        """The stride from `begin` on is read: its queries [stride, H, P] and tokens [stride]."""
        g, kept = self.geometry[layer], self.layers[layer]
        found, faded = kept.found[row], kept.faded[row]
        if not found:
            return
        pool = self._pool([(row, block) for block in found], g, q)
        start = torch.where(pool.owner >= 0, pool.start, NOWHERE)
        k = g.turn(pool.k, g.stands(torch.full_like(start, begin), start))
        q = q[:-1].unflatten(1, (g.kv_heads, -1)) * g.head_dim**-0.5
        votes = torch.full((len(found), g.block), -1)
        later = int(self.config.conv_size == 0)  # or a key is made of the tokens before, and its own came after these
        for i, block in enumerate(found):
            votes[i, : len(block.tokens) - later] = torch.from_numpy(block.tokens[later:].astype(np.int64))
        logits = torch.einsum("nkgp,mbkp->nkgmb", q, k).flatten(1, 2)
        kept.faded[row] = faded.learn(logits, votes.to(q.device), tokens[1:], self.config.vocab_size)
        if self.store is not None and self.write:
            self.store.learned(layer, kept.faded[row].decay)

    def _choose(
        self, layer: int, asked: Tensor, value: Tensor, theirs: dict[tuple[int, int], list[Aged]], begin: Tensor,
        made: dict[int, Block], layout: Layout,
    ) -> tuple[list[tuple[int, Block]], Tensor, Tensor, Tensor]:  # fmt: skip
        """One stride after the other, as what is read in one teaches what to read in the next: the blocks from outside
        the call that are read, and for every stride, whether (0, or -inf), which and with which bias [B, G, blocks].

        asked [B, L, H, P]: queries; value [B, G, U]: scores of the blocks `made` in the call; `theirs`: of the others,
        for the strides that begin in the call.
        """
        g, kept = self.geometry[layer], self.layers[layer]
        assert self._placed is not None
        scores, places, near = _numpy(value) / self.config.num_heads, value.shape[2], value.shape[0] * value.shape[2]
        there = value.new_full((*begin.shape, g.blocks), -torch.inf)
        entry, bias = torch.zeros_like(there, dtype=torch.int64), torch.zeros_like(there)
        number = {(e // places, id(block)): e for e, block in made.items()}
        far: list[tuple[int, Block]] = []
        for (row, i), at in np.ndenumerate(begin.cpu().numpy()):
            slots, offset = slice(i * g.stride, (i + 1) * g.stride), int(layout.offset[row])
            if (row, i) in theirs:
                those = np.flatnonzero(scores[row, i] > -np.inf)[::-1]  # the newest first
                mine = [made[row * places + u] for u in those.tolist()]
                ages = [(int(at) - block.start) // g.block for block in mine]
                bands = kept.faded[row].bands(np.array(ages)).tolist()
                values = scores[row, i, those].tolist()
                self._rank(layer, row, int(at), [*zip(values, ages, bands, mine, strict=True), *theirs[row, i]])
            elif not slots.start < offset < slots.stop:
                continue
            for rank, block in enumerate(kept.found[row]):
                e = number.setdefault((row, id(block)), near + len(far))
                if e == near + len(far):
                    far.append((row, block))
                there[row, i, rank], entry[row, i, rank], bias[row, i, rank] = 0, e, kept.faded[row].bias[rank]
            if layout.valid[row, slots.stop - 1]:
                self._learn(layer, row, int(at), asked[row, slots], self._placed[row, g.block :][slots])
                kept.found[row] = []
        return far, there, entry, bias

    def _best(
        self, candidates: Sequence[tuple[float, int, int, Block | None]], row: int, count: int
    ) -> list[tuple[float, Block]]:
        """The first `count`, fetched where they come from the store, without those that the session keeps."""
        best: list[tuple[float, Block]] = []
        for score, _, number, block in candidates:
            if block is None:
                assert self.store is not None
                block = self.store.get(number)
                if block is None or self._elsewhere(row, block):
                    continue
            best.append((score, block))
            if len(best) == count:
                break
        return best

    def _owns(self, row: int, block: Block) -> bool:
        """It is of the row's own past."""
        if block.source == self.sources[row]:
            return True
        return block.start + len(block.tokens) <= self.ancestors[row].get(block.source, 0)

    def _elsewhere(self, row: int, block: Block) -> bool:
        """Not to be taken from the store: the session keeps it itself, or it is of another branch of the stream."""
        if self._owns(row, block):
            return block.start >= self.released[row]
        return root(block.source) == root(self.sources[row])

    def _pool(self, blocks: Sequence[tuple[int, Block]], g: Geometry, like: Tensor) -> Pool:
        k, v = (like.new_zeros(len(blocks), g.block, g.kv_heads, g.head_dim) for _ in range(2))
        start, owner, count = (torch.empty(len(blocks), dtype=torch.int64) for _ in range(3))
        for i, (row, block) in enumerate(blocks):
            n = len(block.tokens)
            k[i, :n], v[i, :n] = (torch.from_numpy(np.array(z)).to(like) for z in (block.k, block.v))
            start[i], owner[i], count[i] = block.start, row if self._owns(row, block) else -1, n
        return Pool(k, v, *(z.to(like.device) for z in (start, owner, count)))

    def _find_due(self, layer: int, due: Sequence[int], position: Sequence[int], q: Tensor) -> None:
        """Find what the strides that begin now read."""
        g, kept = self.geometry[layer], self.layers[layer]
        kept.laid = None
        asked = [row for row in due if position[row] > 0]
        for row in due:
            kept.found[row] = []
        if not asked:
            return
        assert kept.asking is not None
        begin = torch.tensor([position[row] for row in asked], device=q.device)
        before = begin[:, None] - torch.arange(g.queries, device=q.device)
        before = torch.where(before >= 0, before, begin[:, None])
        rows = torch.tensor(asked, device=q.device)[:, None]
        asking = kept.asking[rows, before % kept.asking.shape[1]].unflatten(-1, q.shape[1:])
        strides = [(row, position[row]) for row in asked]
        if kept.faded:
            for (row, at), some in zip(strides, self._aged(layer, strides, g.asking(asking, begin)), strict=True):
                self._rank(layer, row, at, some)
            return
        for row, found in zip(asked, self._search(layer, strides, g.asking(asking, begin)), strict=True):
            kept.found[row] = [block for _, block in found]

    def _lay(self, layer: int, at: Step, held: Tensor | None, like: Tensor) -> Laid:
        """What was found, for the strides that the tokens are in."""
        g, found = self.geometry[layer], self.layers[layer].found
        most = max(map(len, found))
        blocks = [(row, block) for row, mine in enumerate(found) for block in mine]
        pool = self._pool(blocks, g, like)
        entry = torch.zeros(self.rows, most, dtype=torch.int64, device=like.device)
        there = torch.zeros(self.rows, most, dtype=torch.bool, device=like.device)
        number = 0
        for row, mine in enumerate(found):
            entry[row, : len(mine)] = torch.arange(number, number + len(mine))
            there[row, : len(mine)] = True
            number += len(mine)
        if not blocks:
            empty = like.new_zeros(self.rows, 0, g.kv_heads, g.head_dim)
            return Laid(empty, empty, entry, there, NOWHERE)
        begin = at.position - at.position % g.stride
        start = torch.where(pool.owner[entry] >= 0, pool.start[entry], NOWHERE)
        inner = torch.arange(g.block, device=like.device)
        own = (start[..., None] + inner).flatten(1)
        seen = (there[..., None] & (inner < pool.count[entry][..., None])).flatten(1)
        if held is not None:
            seen = seen & ~(own[..., None] == held[:, None]).any(-1)
        k = g.turn(pool.k[entry], g.stands(begin[:, None], start))
        bias = None
        if faded := self.layers[layer].faded:
            bias = like.new_zeros(self.rows, most)
            for row, each in enumerate(faded):
                bias[row, : len(each.bias)] = like.new_tensor(each.bias)
            bias = bias.repeat_interleave(g.block, 1)
        return Laid(k.flatten(1, 2), pool.v[entry].flatten(1, 2), own, seen, int(own.max()), bias)

    # handing over
    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype) if self.keep else x

    def _hand_over(
        self, layer: int, row: int, start: int, tokens: Tensor, k: Tensor, v: Tensor, keys: Tensor, score: Tensor | None
    ) -> Block:
        """A block that is complete: k, v [block, K, P], what it is found by [r, D], scores [block]."""

        def stored(z: Tensor, dtype: torch.dtype) -> np.ndarray:
            return z.detach().to(dtype).cpu().numpy().copy()

        block = Block(
            layer,
            self.sources[row],
            start,
            tokens=stored(tokens, torch.int32),
            k=stored(k, self.dtype),
            v=stored(v, self.dtype),
            keys=stored(keys, self.dtype),
            score=np.zeros(len(k), np.float32) if score is None else stored(score, torch.float32),
            fingerprint="" if self.store is None else self.store.fingerprint,
        )
        own = self.layers[layer].own[row]
        own.append(block)
        if self.store is not None and self.write:
            self._handed[row] += 1
            self.store.put(block, self._told)
        return block

    def _made(
        self, layer: int, near: Pool, keys: Tensor, scores: Tensor | None, place: Tensor, done: Tensor
    ) -> dict[int, Block]:
        """The blocks that the call completed, handed over, by their entry in the pool."""
        assert self._placed is not None
        made = {}
        size, places = place.shape[1], place.shape[0]
        for row, u in done.nonzero().tolist():
            entry, at = row * places + u, size + place[u]
            score = None if scores is None else scores[row, at]
            made[entry] = self._hand_over(
                layer,
                row,
                int(near.start[entry]),
                self._placed[row, at],
                near.k[entry],
                near.v[entry],
                keys[row, u],
                score,
            )
        return made

    def _make(self, layer: int, row: int, position: int, k: Tensor, v: Tensor) -> None:
        """Hand over the block up to `position`, out of the window's rings."""
        g, kept = self.geometry[layer], self.layers[layer]
        assert self._tokens is not None
        start = position - position % g.block
        positions = torch.arange(start, position + 1, device=k.device)
        ring, place = positions % g.window, positions % g.block
        block_k = self._rounded(g.turn(k[row, ring], -positions))
        score = None if kept.score is None else kept.score[row, place]
        keys = g.found_by(block_k, score)
        self._hand_over(layer, row, start, self._tokens[row, place], block_k, v[row, ring], keys, score)

    def _remember(
        self, kept: Kept, made: dict[int, Block], far: Sequence[tuple[int, Block]], entry: Tensor, value: Tensor,
        layout: Layout,
    ) -> None:  # fmt: skip
        """What was found for the stride in which the call ends."""
        near = len(layout.offset) * (layout.slots // min(self.config.storage_block, layout.chunk))
        read = layout.valid.any(1).tolist()
        for row, (end, position) in enumerate(zip(layout.end.tolist(), layout.next_position.tolist(), strict=True)):
            if not read[row]:
                continue
            i = (end - 1) // self.config.storage_stride
            chosen = entry[row, i][value[row, i] > -torch.inf].tolist() if position % self.config.storage_stride else []
            kept.found[row] = [made[e] if e < near else far[e - near][1] for e in chosen]

    # generations
    def _move(self, at: Layout | Step) -> None:
        """Go on to the newest generation, or where the replay went at this point."""
        if self.store is None:
            return
        if self.replay is not None:
            while self.replay and self.replay[0][0] <= self.read_tokens:
                _, self.generation, self.released = self.replay.pop(0)
                self._release()
            return
        newest = self.store.pin()
        if newest == self.generation and self.read_tokens:
            return
        self.generation = newest
        behind = self.config.window + self.config.storage_block + self.config.storage_stride  # type: ignore[operator]
        released = []
        for row, position in enumerate(at.positions):
            blocks = (block for kept in self.layers.values() for block in kept.own[row].blocks)
            missing = (block.start for block in blocks if not 0 <= self._id(block) <= newest)
            released.append(max(self.released[row], min([position - behind, *missing])))
        self.released = tuple(released)
        if self.record is not None:
            self.record.append((self.read_tokens, newest, self.released))
        self._release()

    def _release(self) -> None:
        for kept in self.layers.values():
            for own, start in zip(kept.own, self.released, strict=True):
                for block in own.release(start):
                    self._ids.pop(_key(block), None)


def root(source: str) -> str:
    """The name of a stream, of whichever of its branches `source` is."""
    return source.partition(BRANCH)[0]


def _key(block: Block) -> tuple[str, int, int]:
    return block.source, block.layer, block.start


def _numpy(z: Tensor) -> np.ndarray:
    return z.detach().cpu().to(torch.promote_types(z.dtype, torch.float32)).numpy()


def _first(z: Tensor, count: int, fill: float) -> Tensor:
    """The first `count` of z [..., n], filled up if there are fewer."""
    return torch.nn.functional.pad(z[..., :count], (0, max(0, count - z.shape[-1])), value=fill)
