"""Reading all memories in one softmax: the chunked form and FlexAttention against the definition."""

from __future__ import annotations

import pytest
import torch
from cases import close, draw_tokens, make_model, small_preset
from reading import CALLS, CHUNK, PACKED, PADDED, TIME, WINDOW, drawn, held_positions
from torch.nn.attention import flex_attention as torch_flex

from bmojo.memory import flex, read_cpu
from bmojo.memory.read import key_spans, read_chunked, read_naive, slot_spans
from bmojo.nn import mixer as mixer_module
from bmojo.nn.mixer import Trace


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """FlexAttention as PyTorch's own reference, and small blocks."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "BLOCK", 8)


def read_flex(q, sources, slots, layout, *, usage=False):
    return flex.run(torch_flex.flex_attention, q.detach(), sources, slots, layout, usage)


@pytest.mark.parametrize("stride", [1, CHUNK])
@pytest.mark.parametrize("call", CALLS)
def test_spans_are_the_masks(call, stride):
    _, sources, _, layout = drawn(call, stride)
    slot = torch.arange(layout.slots)[:, None]
    segment, valid, position = layout.segment_of_slot, layout.valid, layout.position
    for source in sources:
        at, of = layout.sources(source.size, stride := source.stride)
        back = position[..., None] - at[:, None]
        expected = (of[:, None] == segment[..., None]) & (at[:, None] >= 0)
        expected &= (back >= source.nearest) & (back < source.nearest + source.span)
        first, last = (z.expand(2, -1) for z in key_spans(layout, source.size, stride, source.nearest, source.span))
        seen = (first[:, None] <= slot) & (slot <= last[:, None])
        assert torch.equal(seen[valid], expected[valid])
    positions = held_positions(layout)
    first, last = slot_spans(positions, layout, WINDOW)
    chunk = torch.arange(layout.slots) // CHUNK
    held = positions[:, chunk]  # what each query finds in the slots
    expected = (held >= 0) & (held <= position[..., None] - WINDOW) & valid[..., None]
    assert torch.equal((first[:, chunk] <= slot) & (slot <= last[:, chunk]), expected)
    assert expected.any()


SHAPES = [(1, 4, 2, 3), (CHUNK, 2, 2, 3), (1, 3, 1, 6)]  # stride, heads, groups, width of keys


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", [read_chunked, read_cpu.read])
def test_all_forms_equal_naive_forwards_and_backwards(form, call, shape):
    q, sources, slots, layout = drawn(call, *shape)
    leaves = {"q": q, "slot k": slots.k, "slot v": slots.v}
    for i, source in enumerate(sources):
        leaves |= {f"k {i}": source.k, f"v {i}": source.v}
    results = []
    for one in (read_naive, form):
        o, used = one(q, sources, slots, layout, usage=True)
        o = o * layout.valid[..., None, None]
        weight = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((o * weight).sum(), list(leaves.values()))
        results.append({"o": o, "used": used} | {f"d {n}": z for n, z in zip(leaves, gradients, strict=True)})
    for name, expected in results[0].items():
        close(results[1][name], expected, 1e-12, name)
    assert results[0]["used"].max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_flex_attention_equals_naive(call, shape):
    q, sources, slots, layout = drawn(call, *shape)
    for some in (slots, None):
        expected, used = read_naive(q, sources, some, layout, usage=True)
        got, also = read_flex(q, sources, some, layout, usage=True)
        close(got[layout.valid], expected[layout.valid], 1e-12)
        if some is not None:
            close(also, used, 1e-12)
    alone, none = read_flex(q, sources[:1], None, layout)
    close(alone[layout.valid], read_naive(q, sources[:1], None, layout)[0][layout.valid], 1e-12)
    assert none is None


@pytest.mark.parametrize("stride", [1, CHUNK])
@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("call", CALLS)
def test_the_table_of_blocks_leaves_nothing_out(call, block, stride, monkeypatch):
    """Every block of keys that a query sees is listed, once; those listed as whole are seen by all, and the lists by
    block of keys tell the same as those by block of queries."""
    monkeypatch.setattr(flex, "BLOCK", block)
    _, sources, slots, layout = drawn(call, stride)
    mask = flex.block_mask(sources, slots, layout)
    count = mask.seq_lengths[1]
    index = torch.arange(2), torch.arange(layout.slots), torch.arange(count)
    seen = mask.mask_mod(index[0][:, None, None], None, index[1][:, None], index[2])
    seen = torch.nn.functional.pad(seen, (0, 0, 0, -layout.slots % block)).unflatten(2, (-1, block))
    seen = seen.unflatten(1, (-1, block))  # [batch, query block, query, key block, key]

    def listed(counts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        rank = torch.zeros_like(index).scatter(
            -1, index.long(), torch.arange(index.shape[-1], dtype=index.dtype).expand_as(index)
        )
        return (rank < counts[..., None])[:, 0]

    partial, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.mT)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), whole.mT)
    assert not (partial & whole).any()
    assert bool((seen.any(4).any(2) <= (partial | whole)).all())
    assert bool((seen.all(4).all(2) >= whole).all())
    assert whole.any() or block > 4
    assert partial.float().mean() < 0.7 or block > 4  # the rest is left out


def test_a_layout_keeps_the_table():
    _, sources, slots, layout = drawn("packed")
    first, second = (flex.block_mask(sources, slots, layout) for _ in range(2))
    assert first.kv_indices is second.kv_indices
    assert first.mask_mod is not second.mask_mod


@pytest.mark.parametrize("name", ["swa", "hybrid", "bmojo_f", "bmojo"])
@pytest.mark.parametrize("changes", [{}, {"tie_sources": False, "num_kv_heads": 1}, {"fading": "summary"}])
@torch.no_grad()
def test_models_read_through_it(name, changes, monkeypatch):
    if name in ("swa", "hybrid"):
        changes = {}
    model = make_model(small_preset(name, **changes))
    tokens, results = draw_tokens(2, 2 * TIME), []
    for form in (read_chunked, read_flex):
        monkeypatch.setattr(mixer_module, "read", form)
        first, state = model(tokens[:, :TIME], mask=PADDED, document_ids=PACKED)
        second, state = model(tokens[:, TIME:], state)
        results.append((first[PADDED], second, *state.layers[-1].values()))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


def test_admission_learns_from_it(monkeypatch):
    model = make_model(small_preset("bmojo", admission="learned"))
    losses = []
    for form in (read_chunked, read_naive):
        monkeypatch.setattr(mixer_module, "read", form)
        trace = Trace()
        model(draw_tokens(2, TIME), trace=trace)
        losses.append(torch.stack(trace.losses))
    close(*losses)
    assert losses[0].any()
