"""The one sequence mixer of the family: which memories a layer has is configuration.

Input x [B, T, D], o = mixer(x): with y, S the fading tokens and state of the layer's SSM, query i of chunk c attends,
in ONE softmax, to

    window    x_j, j in (i-W, i]                     itself and the W-1 before
    fading    y_j, j in (i-W-F, i-W]                 fading="summary": only the y at the ends of chunks
    eidetic   x_p, p in M_c and p <= i-W             the E tokens of highest score before the chunk
    storage   the blocks of tokens found for i       if a `bmojo.memory.storage.Storage` is given

    position  0 ............................................. i
    eidetic   x   x     x        x            (M_c, at most E)
    fading                        yyyyyyyyyy  (i-W-F, i-W]
    window                                  xxxxxxxxxx  (i-W, i]

so no token is seen twice and none falls between. With `conv_size`, keys are made from a short causal convolution of
x, queries and values from x itself: a stored value then carries the key it came under.
Chunks, padding and documents: `bmojo.memory.layout`.
A layer of kind "ssm" gives y itself; one of kind "attention" has the window alone (window=None: everything), one of
kind "full" everything.

The state of a layer is a dict of tensors, batch first: `bmojo.memory.spec` names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bmojo.config import ModelConfig
from bmojo.memory.eidetic import compact_positions, keep_best, select
from bmojo.memory.faded import biased_keys, biased_queries
from bmojo.memory.layout import Layout, make_layout
from bmojo.memory.read import Slots, Source, read, slot_spans
from bmojo.memory.spec import fading_entries, layer_spec
from bmojo.memory.step import Step, grow
from bmojo.memory.storage import Storage
from bmojo.nn.admission import Admission, usage_loss
from bmojo.nn.init import KeyConv, Linear, Output, RMSNorm
from bmojo.nn.innovation import Innovation
from bmojo.nn.linearize import linearize
from bmojo.nn.ssm import Prediction, State, make_ssm
from bmojo.ops.attention import attend, attend_rows
from bmojo.ops.innovation import rls_start
from bmojo.ops.rope import rope_table, rotate

Place = Layout | Step
Rope = tuple[Tensor, Tensor]


@dataclass
class Trace:
    """What the caller asks a forward pass to note down, one entry a layer that has it."""

    innovation: list[Tensor] = field(default_factory=list)  # [B, T] scores: times the odds, if admission is learned
    kept: list[Tensor] = field(default_factory=list)  # [B, E] positions in the slots at the end, -1: empty
    losses: list[Tensor] = field(default_factory=list)  # [B] auxiliary losses of each row, weighted
    hidden: list[Tensor] | None = None  # if a list: [B, T, D], the embeddings and what each block gives; one more

    def extend(self, other: Trace) -> None:
        self.innovation += other.innovation
        self.kept += other.kept
        self.losses += other.losses


class Mixer(nn.Module):
    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.config, self.kind, self.index = config, config.kinds[index], index
        self.window = config.window_of(self.kind)
        has = config.parts(self.kind)
        self.has_fading = has.fading
        self.innovation = Innovation(config, index) if has.eidetic else None
        learned = has.eidetic and config.admission == "learned"
        self.admission = Admission(config.hidden_size, shifted=config.conv_size > 0) if learned else None
        self.ssm = make_ssm(config) if has.ssm else None
        if not has.attention:
            return
        std, heads, kv_heads, size = config.initializer_range, config.num_heads, config.num_kv_heads, config.head_dim
        self.conv = KeyConv(config.hidden_size, config.conv_size) if config.conv_size else None
        bias = config.qkv_bias
        self.q_proj = Linear(config.hidden_size, heads * size, std, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * size, std, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * size, std, bias=bias)
        self.o_proj = Output(heads * size, config.hidden_size, std)
        self.q_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else None
        self.own_sources = self.has_fading and not config.tie_sources
        if self.own_sources:
            self.fading_q_proj = Linear(config.hidden_size, heads * size, std, bias=bias)
            self.fading_k_proj = Linear(config.hidden_size, kv_heads * size, std, bias=bias)
            self.fading_v_proj = Linear(config.hidden_size, kv_heads * size, std, bias=bias)
            self.fading_q_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else None
            self.fading_k_norm = RMSNorm(size, config.norm_eps) if config.qk_norm else None

    def empty_state(self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> State:
        """The state before any token."""
        dtypes = {"verbatim": dtype, "exact": torch.promote_types(dtype, torch.float32), "integer": torch.int64}
        state = {
            name: torch.zeros(batch, *entry.shape, device=device, dtype=dtypes[entry.kind])
            for name, entry in layer_spec(self.config, self.kind).items()
        }
        for name in ("document", "slot_position"):
            if name in state:
                state[name] -= 1
        if "rls_M" in state:
            state["rls_A"], state["rls_M"] = rls_start(batch, state["rls_A"].shape[-1], state["rls_A"])
        return state

    # entry points
    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, State]:
        """x [B, T, D] -> o [B, T, D] and the state after it. `mask` [B, T] is False at padding; `document_ids` [B, T]
        changes where a document starts."""
        layout = make_layout(
            x.shape[0],
            x.shape[1],
            self.config.chunk_size,
            x.device,
            position=None if state is None else state["position"],
            document=None if state is None else state["document"],
            mask=mask,
            document_ids=document_ids,
        )
        o, state = self.mix(layout.place(x), state, layout, trace)
        return layout.restore(o), state

    def mix(
        self, x: Tensor, state: State | None, layout: Layout, trace: Trace | None = None, storage: Storage | None = None
    ) -> tuple[Tensor, State]:
        """The same on a sequence that is laid out already: x [B, L, D]."""
        new: State = {"position": layout.next_position, "document": layout.document}
        y, prediction = None, None
        if self.ssm is not None:
            y, part, prediction = self.ssm(x, state, layout, predict=self._predicts)
            new |= part
            if self.kind == "ssm":
                return y, new
        shifted = x
        if self.conv is not None:
            extended = layout.extend(x, None if state is None else state["conv"], self.conv.lags)
            shifted = self.conv(extended, layout.position if layout.packed else None)
            new["conv"] = layout.tail(extended, self.conv.lags)
        q = self._queries(x, layout)
        k, v = self._keys(shifted, x, self._rope(layout, x.dtype))
        if self.window is None:
            o, part = self._read_everything(q, k, v, state, layout)
        else:
            o, part = self._read_memories(q, k, v, x, shifted, y, prediction, state, layout, trace, storage)
        return self.o_proj(o.flatten(-2)), new | part

    def step(
        self, x: Tensor, state: State, at: Step, trace: Trace | None = None, storage: Storage | None = None
    ) -> tuple[Tensor, State]:
        """One token a row: x [B, D] -> o [B, D]."""
        new: State = {"position": at.next_position, "document": at.document}
        y, prediction = None, None
        if self.ssm is not None:
            y, part, prediction = self.ssm.step(x, state, at, predict=self._predicts)
            new |= part
            if self.kind == "ssm":
                return y, new
        shifted = x
        if self.conv is not None:
            shifted, new["conv"] = self.conv.step(x, at.own(state["conv"]))
        q, table = self._queries(x, at), self._rope(at, x.dtype)
        k, v = self._keys(shifted, x, table)
        o, part = self._step_attention(q, k, v, x, shifted, y, prediction, state, at, trace, storage)
        return self.o_proj(o.flatten(-2)), new | part

    def linearize(self, state: State, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The Jacobians A, B, C, D, float64, of one step from the state of one row at the input x [hidden_size], or 0:

            d state(t+1) = A d state(t) + B d x(t),   d o(t) = C d state(t) + D d x(t)

        State coordinates are the numbers of ssm, ssm_conv, conv, k, v, fading_k, fading_v, slot_k, slot_v, those that
        the layer has, in this order, rings newest entry first: the window is a shift. What chooses the tokens of the
        slots has no derivative and is held as it is. `bmojo.realize.LTI(*A_B_C_D)` takes it on.
        Raises StateError for several rows, a layer that reads the whole past, or a state of more than 8192 numbers.
        """
        return linearize(self, state, x)

    @property
    def _predicts(self) -> bool:
        return self.innovation is not None and self.innovation.kind == "state"

    # keys and values
    def _queries(self, x: Tensor, at: Place) -> Tensor:
        q = self._project(x, self.q_proj, self.q_norm, self._rope(at, x.dtype))
        if not self.own_sources:
            return q
        # One softmax of two queries: [q | q'] against [k | 0] and [0 | k'], at the scale of head_dim, not twice that.
        own = self._project(x, self.fading_q_proj, self.fading_q_norm, self._rope(at, x.dtype))
        return torch.cat((q, own), -1) * 2**0.5

    def _project(self, x: Tensor, projection: Linear, norm: RMSNorm | None, table: Rope | None = None) -> Tensor:
        """[..., D] -> [..., heads, head_dim]: normalised, and turned by `table`."""
        x = projection(x).unflatten(-1, (-1, self.config.head_dim))
        x = x if norm is None else norm(x)
        return x if table is None else rotate(x, table)

    def _as_compared(self, k: Tensor, *, fading: bool = False) -> Tensor:
        """Keys [..., head_dim] as the queries are compared with them."""
        if not self.own_sources:
            return k
        size = self.config.head_dim
        return nn.functional.pad(k, (size, 0) if fading else (0, size))

    def _plain(self, q: Tensor) -> Tensor:
        """Of the queries [..., heads, width], what is compared with keys of tokens."""
        return q[..., : self.config.head_dim] * 2**-0.5 if self.own_sources else q

    def _keys(self, shifted: Tensor, x: Tensor, table: Rope, *, fading: bool = False) -> tuple[Tensor, Tensor]:
        """Keys of `shifted`, turned by `table`, and values of `x`."""
        key, value, norm = (
            (self.fading_k_proj, self.fading_v_proj, self.fading_k_norm)
            if fading and self.own_sources
            else (self.k_proj, self.v_proj, self.k_norm)
        )
        return self._project(shifted, key, norm, table), self._project(x, value, None)

    def _rope(self, at: Place, dtype: torch.dtype) -> Rope:
        return at.rope(self.config.head_dim, self.config.rope_theta, dtype)

    def _table(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        return rope_table(positions, self.config.head_dim, self.config.rope_theta, dtype)

    # the chunked form
    def _read_everything(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, layout: Layout
    ) -> tuple[Tensor, State]:
        """Causal attention over the whole document, behind a cache that grows."""
        q = q.transpose(1, 2)
        if state is None and not layout.packed:
            o = attend(q, k.transpose(1, 2), v.transpose(1, 2), causal=True)
        else:
            old_k, old_v = (state["k"], state["v"]) if state is not None else (k[:, :0], v[:, :0])
            size = old_k.shape[1]
            start = layout.position[:, :1] + layout.offset[:, None]
            number = torch.arange(size, device=k.device)
            new_position = layout.position.masked_fill(~layout.valid, -1)
            at = torch.cat((number.expand(k.shape[0], -1), new_position), 1)[:, None]
            of = torch.cat(((number < start).long() - 1, layout.segment_of_slot), 1)[:, None]
            mine = layout.segment_of_slot[..., None]
            mask = (of == mine) & (at <= layout.position[..., None]) & (at >= 0)
            mask = mask | ~layout.valid[..., None] & (at < 0)  # a row of padding sees padding, not nothing
            keys, values = torch.cat((old_k.to(k.dtype), k), 1), torch.cat((old_v.to(v.dtype), v), 1)
            o = attend(q, keys.transpose(1, 2), values.transpose(1, 2), mask[:, None])
        return o.transpose(1, 2), {name: self._append(state, name, new, layout) for name, new in (("k", k), ("v", v))}

    def _append(self, state: State | None, name: str, new: Tensor, layout: Layout) -> Tensor:
        """The cache `name` with the tokens of this call written at their positions in the last document."""
        old = new[:, :0] if state is None else state[name].to(new.dtype)
        if layout.source is None and old.shape[1] == 0:
            return grow(new[:, : layout.time], layout.time)
        length = int(layout.next_position.max())
        cache = grow(old, length)
        last = layout.segment.gather(1, ((layout.end - 1).clamp(min=0) // layout.chunk)[:, None])
        mine = layout.valid & (layout.segment_of_slot == last)
        spare = cache.shape[1]  # one row more, for what is not written
        target = torch.where(mine, layout.position, spare)[..., None, None].expand_as(new)
        return nn.functional.pad(cache, (0, 0, 0, 0, 0, 1)).scatter(1, target, new)[:, :spare]

    def _read_memories(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, shifted: Tensor, y: Tensor | None, prediction: Prediction,
        state: State | None, layout: Layout, trace: Trace | None, storage: Storage | None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """The queries against window, fading tokens, eidetic slots and storage: `bmojo.memory.read`."""
        config = self.config
        W, F, stride = self.window, config.fading_span, config.fading_stride
        assert W is not None
        k, v = (layout.history(None if state is None else state[n], z, W) for n, z in (("k", k), ("v", v)))
        new = {"k": layout.ring(k, W), "v": layout.ring(v, W)}
        sources, slots, score, held = [Source(self._as_compared(k), v, W, 1, 0, W)], None, None, None
        if self.has_fading:
            assert y is not None
            size = fading_entries(config)
            every = slice(stride - 1, None, stride)
            cos, sin = self._rope(layout, y.dtype)
            rows = self._keys(y[:, every], y[:, every], (cos[:, every], sin[:, every]), fading=True)
            past_k, past_v = (
                layout.history(None if state is None else state[name], z, size, stride)
                for name, z in zip(("fading_k", "fading_v"), rows, strict=True)
            )
            new |= {"fading_k": layout.ring(past_k, size, stride), "fading_v": layout.ring(past_v, size, stride)}
            sources.append(Source(self._as_compared(past_k, fading=True), past_v, size, stride, W, F))
        if self.innovation is not None:
            score, part, loss = self.innovation(shifted, y, prediction, state, layout)
            new |= part
            if self.admission is not None:
                odds = self.admission(x, shifted)
                score = score * odds.detach().exp()
            slots, index, held, part = self._recall(k[:, W:], v[:, W:], score, state, layout)
            new |= part
            if trace is not None:
                trace.innovation.append(layout.restore(score))
                trace.kept.append(part["slot_position"])
                if loss is not None:
                    trace.losses.append(config.head_loss_weight * loss)
        seen, stored = slots, None
        if storage is not None and self.index in storage.layers:
            found = storage.read(self.index, self._plain(q), k, v, score, held, layout)
            if found is not None:
                stored, bias = found
                stored = replace(stored, k=self._as_compared(stored.k))
                if bias is not None:
                    q, stored = biased_queries(q), replace(stored, k=biased_keys(stored.k, bias))
                    sources = [replace(source, k=biased_keys(source.k)) for source in sources]
                    slots = None if slots is None else replace(slots, k=biased_keys(slots.k))
                seen = stored if slots is None else slots.join(stored)
        usage = self.admission is not None and trace is not None and odds.requires_grad
        o, used = read(q, sources, seen, layout, usage=usage)
        if used is not None:
            assert slots is not None
            assert trace is not None
            before = 0 if state is None else config.eidetic_slots
            here = nn.functional.pad(layout.valid, (before, 0))  # tokens of other calls have no gradient in this one
            visible = (slots.first <= slots.last) & here.gather(1, index.flatten(1)).view_as(index)
            token = (index - before).clamp(min=0)
            token = token + layout.slots * torch.arange(len(token), device=token.device)[:, None, None]
            if stored is not None and stored.token is not None:
                token = torch.cat((token, stored.token), 2)
                visible = torch.cat((visible, stored.first <= stored.last), 2)
            loss = usage_loss(odds, token, used[..., : token.shape[2]], visible)
            trace.losses.append(config.admission_loss_weight * loss)
        return o, new

    def _recall(
        self, k: Tensor, v: Tensor, score: Tensor, state: State | None, layout: Layout
    ) -> tuple[Slots, Tensor, Tensor, State]:
        """Every chunk's eidetic set, where `select` found it and its positions [B, N, E], and the new slots.

        `k` [B, L, K, P] is turned by true positions; the slots hold it so, or, for compact positions, turned back.
        """
        config, batch = self.config, score.shape[0]
        compact = config.positions == "compact"
        assert config.window is not None
        if compact:
            cos, sin = self._rope(layout, k.dtype)
            k = rotate(k, (cos, -sin))
        held = None
        if state is not None:
            slots = torch.arange(config.chunk_size, device=k.device)
            before = torch.where(slots < layout.offset[:, None], state["pending"], score[:, : config.chunk_size])
            score = torch.cat((before, score[:, config.chunk_size :]), 1)
            held = state["slot_score"], state["slot_position"]
            k, v = torch.cat((state["slot_k"].to(k.dtype), k), 1), torch.cat((state["slot_v"].to(v.dtype), v), 1)
        index, position, (best, where, last) = select(
            score,
            layout,
            config.eidetic_slots,
            decay=config.eidetic_decay,
            threshold=config.eidetic_threshold,
            held=held,
        )
        offset = (torch.arange(batch, device=k.device) * k.shape[1])[:, None]

        def pick(source: Tensor, index: Tensor) -> Tensor:
            return (
                source.flatten(0, 1)
                .index_select(0, (index.flatten(1) + offset).flatten())
                .view(*index.shape, *source.shape[2:])
            )

        slot_k, slot_v = pick(k, index), pick(v, index)
        start = layout.position[:, :: layout.chunk]
        if compact:
            turned = compact_positions(position, start, config.window + config.fading_span)
            slot_k = rotate(slot_k, self._table(turned, k.dtype))
        progress = torch.arange(config.chunk_size, device=k.device)
        count = (layout.next_position % config.chunk_size)[:, None]
        pending = score.gather(1, (layout.end[:, None] - count + progress).clamp(max=score.shape[1] - 1))
        new = {
            "slot_k": pick(k, last),
            "slot_v": pick(v, last),
            "slot_score": best,
            "slot_position": where,
            "pending": pending * (progress < count),
        }
        spans = slot_spans(position, layout, config.window)
        return Slots(self._as_compared(slot_k), slot_v, *spans), index, position, new

    # one token
    def _step_attention(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, shifted: Tensor, y: Tensor | None, prediction: Prediction,
        state: State, at: Step, trace: Trace | None, storage: Storage | None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        config, score = self.config, None
        if self.window is None:
            new = {name: at.put(at.room(state[name]), at.position, z) for name, z in (("k", k), ("v", v))}
            return attend_rows(q, [new["k"]], [new["v"]], [at.reachable_in_cache(new["k"].shape[1])]), new
        W, F, stride = self.window, config.fading_span, config.fading_stride
        new = {"k": at.put_in_ring(state["k"], k), "v": at.put_in_ring(state["v"], v)}
        keys, values, masks = [self._as_compared(new["k"])], [new["v"]], [at.reachable(W, 1, 0, W)]
        if self.has_fading:
            assert y is not None
            fading_k, fading_v = self._keys(y, y, self._rope(at, y.dtype), fading=True)
            new["fading_k"] = at.put_in_ring(state["fading_k"], fading_k, stride)
            new["fading_v"] = at.put_in_ring(state["fading_v"], fading_v, stride)
            keys.append(self._as_compared(new["fading_k"], fading=True))
            values.append(new["fading_v"])
            masks.append(at.reachable(fading_entries(config), stride, W, F))
        if self.innovation is not None:
            position = state["slot_position"]
            slot_k = state["slot_k"]
            if config.positions == "compact":
                start = at.position - at.position % config.chunk_size
                slot_k = rotate(slot_k, self._table(compact_positions(position, start, W + F), slot_k.dtype))
            keys.append(self._as_compared(slot_k))
            values.append(state["slot_v"])
            masks.append((position >= 0) & (position <= at.position[:, None] - W))
            score, part = self.innovation.step(shifted, y, prediction, state, at)
            new |= part
            if self.admission is not None:
                score = score * self.admission(x, shifted).detach().exp()
            new |= self._admit(score, new, state, at)
            if trace is not None:
                trace.innovation.append(score[:, None])
                trace.kept.append(new["slot_position"])
        if storage is not None and self.index in storage.layers:
            held = state.get("slot_position")
            found = storage.step(self.index, self._plain(q), new["k"], new["v"], score, held, at)
            if found is not None:
                stored_k, stored_v, visible, bias = found
                stored_k = self._as_compared(stored_k)
                if bias is not None:
                    q, stored_k = biased_queries(q), biased_keys(stored_k, bias)
                    keys = [biased_keys(one) for one in keys]
                keys.append(stored_k)
                values.append(stored_v)
                masks.append(visible)
                if storage.attention is not None:
                    storage.attended(self.index, q, keys, masks)
        return attend_rows(q, keys, values, masks), new

    def _admit(self, score: Tensor, new: State, state: State, at: Step) -> State:
        """Note the token's score; at the end of a chunk, let its tokens compete for the slots."""
        config, chunk = self.config, self.config.chunk_size
        assert config.window is not None
        names = ("slot_k", "slot_v", "slot_score", "slot_position")
        pending = at.put(state["pending"], at.position % chunk, score)
        kept = {name: state[name] for name in names} | {"pending": pending}
        if not at.any_ends_chunk:
            return kept
        back = torch.arange(chunk, device=score.device)  # newest first
        position = at.position[:, None] - back
        place = position % config.window
        row = torch.arange(score.shape[0], device=score.device)[:, None]
        k, v = new["k"][row, place], new["v"][row, place]
        if config.positions == "compact":
            k = rotate(k, self._table(-position, k.dtype))
        candidates = {
            "slot_k": torch.cat((k, state["slot_k"]), 1),
            "slot_v": torch.cat((v, state["slot_v"]), 1),
            "slot_score": torch.cat((pending.flip(1), state["slot_score"]), 1),
            "slot_position": torch.cat((position, state["slot_position"]), 1),
        }
        order, is_one = keep_best(
            candidates["slot_score"],
            candidates["slot_position"],
            at.next_position,
            config.eidetic_slots,
            decay=config.eidetic_decay,
            threshold=config.eidetic_threshold,
        )
        for name in names:
            best = candidates[name][row, order]
            if name == "slot_position":
                best = best.masked_fill(~is_one, -1)
            ends = at.ends_chunk.view(-1, *(1,) * (best.ndim - 1))
            kept[name] = torch.where(ends, best, state[name])
        kept["pending"] = pending.masked_fill(at.ends_chunk[:, None], 0)
        return kept
