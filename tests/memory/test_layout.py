"""Where tokens stand: the docstring's example, and the rule behind it on drawn calls."""

from __future__ import annotations

import pytest
import torch
from cases import partitions
from hypothesis import given
from hypothesis import strategies as st

from bmojo.errors import StateError
from bmojo.memory.layout import Layout, blocks, make_layout

CPU = torch.device("cpu")


def layout_of(batch: int, time: int, chunk: int, **given: torch.Tensor) -> Layout:
    return make_layout(batch, time, chunk, CPU, **given)


@pytest.fixture
def example() -> Layout:
    """. a b c|d e f g .  behind two tokens of a's document, in chunks of 4."""
    return layout_of(
        1, 9, 4,
        position=torch.tensor([2]), document=torch.tensor([5]),
        mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0]]),
        document_ids=torch.tensor([[0, 5, 5, 5, 6, 6, 6, 6, 0]]),
    )  # fmt: skip


def test_the_example_of_the_docstring(example):
    assert (example.slots, example.chunks) == (12, 3)
    assert example.valid[0].int().tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    assert example.position[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert example.segment[0].tolist() == [0, 0, 1]
    assert example.resets is not None
    assert example.resets[0].tolist() == [False, False, True]
    assert example.complete[0].tolist() == [True, False, True]
    assert (example.offset.item(), example.end.item()) == (2, 12)
    assert (example.next_position.item(), example.document.item()) == (4, 6)

    letters = torch.tensor([[ord(c) for c in "!abcdefg!"]])
    assert "".join(chr(c) if c else "." for c in example.place(letters)[0]) == "..abc...defg"
    assert "".join(chr(c) if c else "." for c in example.restore(example.place(letters))[0]) == ".abcdefg."


def test_a_call_without_padding_is_laid_out_as_it_is():
    layout = layout_of(2, 6, 4)
    assert layout.source is None
    assert layout.slots == 8
    assert layout.resets is None
    assert layout.position[0].tolist() == list(range(8))
    assert layout.valid[0].int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert layout_of(1, 4, 4, position=torch.tensor([8])).position[0].tolist() == [8, 9, 10, 11]


def test_a_row_of_padding_leaves_everything_where_it_was():
    mask = torch.tensor([[True, True], [False, False]])
    layout = layout_of(2, 2, 4, position=torch.tensor([3, 6]), document=torch.tensor([1, 2]), mask=mask)
    assert layout.next_position.tolist() == [5, 6]
    assert layout.document.tolist() == [1, 2]
    assert not layout.valid[1].any()


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, dict[str, torch.Tensor]]:
    time, chunk = draw(st.integers(1, 15)), draw(st.integers(1, 5))
    given: dict[str, torch.Tensor] = {}
    if draw(st.booleans()):
        given["position"] = torch.tensor(draw(st.lists(st.integers(0, 12), min_size=2, max_size=2)))
        given["document"] = torch.tensor([0, 0])
    if draw(st.booleans()):
        given["mask"] = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=2, max_size=2))
        )
    if draw(st.booleans()):
        rows = [draw(partitions(time)) for _ in range(2)]
        first = draw(st.integers(0, 1))
        given["document_ids"] = torch.stack(
            [torch.cat([torch.full((n,), first + i) for i, n in enumerate(row)]) for row in rows]
        )
    return chunk, given | {"tokens": torch.arange(1, 1 + 2 * time).view(2, time)}


@given(calls())
def test_every_token_has_one_slot_and_counts_on_from_the_token_before(call):
    chunk, given = call
    tokens = given.pop("tokens")
    layout = layout_of(*tokens.shape, chunk, **given)
    mask = given.get("mask", torch.ones_like(tokens, dtype=torch.bool))
    ids = given.get("document_ids")
    at = layout.place(tokens)
    assert torch.equal(layout.restore(at), tokens * mask)
    assert torch.equal(at > 0, layout.valid)
    assert torch.equal(layout.position % chunk, torch.arange(layout.slots).expand(2, -1) % chunk)
    for b in range(2):
        position = int(given["position"][b]) if "position" in given else 0
        document = int(given["document"][b]) if "document" in given else -1
        segment = 0
        for t in torch.nonzero(mask[b])[:, 0].tolist():
            if ids is not None:
                if document >= 0 and ids[b, t] != document:
                    position, segment = 0, segment + 1
                document = int(ids[b, t])
            (slot,) = torch.nonzero(at[b] == tokens[b, t])[:, 0].tolist()
            assert layout.position[b, slot] == position
            assert layout.segment[b, slot // chunk] == segment
            position += 1
        assert layout.next_position[b] == position
        assert layout.document[b] == document


@given(calls(), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_keys_in_reach_are_those_of_the_window(call, back, skip, by_chunk):
    """With positions kept as values in a ring: every query sees its window of its document."""
    chunk, given = call
    tokens = given.pop("tokens")
    layout = layout_of(*tokens.shape, chunk, **given)
    stride = chunk if by_chunk else 1
    nearest, span = skip * chunk, back * chunk
    size = (nearest + span) // stride
    ring = None
    if "position" in given:  # entry n, of position n * stride + stride - 1, is at n % size
        newest = (given["position"] // stride - 1)[:, None]
        ring = (newest - (newest - torch.arange(size)) % size) * stride + stride - 1
        ring = ring[..., None].double()
    values = layout.position[:, stride - 1 :: stride, None].double()
    history = layout.history(ring, values, size, stride)
    keys = blocks(history, layout.chunks, chunk // stride, size, nearest // stride)[..., 0]
    mask = layout.reachable(size, stride, nearest, span).expand(2, -1, -1, -1)
    for b, slot in torch.nonzero(layout.valid).tolist():
        c, i = divmod(slot, chunk)
        here = int(layout.position[b, slot])
        seen = keys[b, c][mask[b, c, i]].tolist()
        wanted = [p for p in range(max(0, here - nearest - span + 1), here - nearest + 1) if (p + 1) % stride == 0]
        assert sorted(seen) == wanted
    after = layout.ring(history, size, stride)[..., 0]
    for b in range(2):
        newest = int(layout.next_position[b]) // stride - 1
        for n in range(max(0, newest - size + 1), newest + 1):
            if layout.valid[b].any() or ring is not None:
                assert after[b, n % size] == n * stride + stride - 1


def test_shapes_are_checked():
    with pytest.raises(StateError, match=r"mask must have the shape of the tokens \(2, 3\), got \(2, 4\)"):
        layout_of(2, 3, 4, mask=torch.ones(2, 4))
    with pytest.raises(StateError, match="document_ids"):
        layout_of(2, 3, 4, document_ids=torch.ones(3))
