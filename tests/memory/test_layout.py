"""Where tokens stand: the docstring's example, and the rule behind it on drawn calls."""

from __future__ import annotations

import pytest
import torch
from cases import partitions
from hypothesis import given
from hypothesis import strategies as st

from bmojo.errors import StateError
from bmojo.memory.layout import Layout, blocks, make_layout
from bmojo.ops.rope import rope_table

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
    assert (example.time, example.slots, example.chunks) == (9, 12, 3)
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
    aligned = layout_of(1, 4, 4, position=torch.tensor([8]))
    assert aligned.source is None
    assert aligned.position[0].tolist() == [8, 9, 10, 11]
    assert layout_of(1, 4, 4, mask=torch.ones(1, 4, dtype=torch.int64)).source is None  # nothing is masked
    assert (layout.whole, aligned.whole, layout_of(1, 8, 4).whole) == (False, True, True)
    assert layout.packed is False
    assert {z.dtype for z in (layout.position, layout.segment, layout.document)} == {torch.int64}


def test_a_document_far_into_a_call_begins_at_0():
    layout = layout_of(1, 400, 4, document_ids=(torch.arange(400) >= 302).long()[None])
    assert layout.position[0].tolist() == [*range(304), *range(100)]  # slots 302 and 303 are empty


def test_documents_are_whole_numbers():
    layout = layout_of(1, 3, 4, document_ids=torch.tensor([[0.0, 7.0, 7.0]]))
    assert layout.document.dtype == torch.int64
    assert layout.document.tolist() == [7]


def test_a_row_of_padding_leaves_everything_where_it_was():
    mask = torch.tensor([[True, True], [False, False]])
    layout = layout_of(2, 2, 4, position=torch.tensor([3, 6]), document=torch.tensor([1, 2]), mask=mask)
    assert layout.next_position.tolist() == [5, 6]
    assert layout.document.tolist() == [1, 2]
    assert not layout.valid[1].any()


def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[1, n, 1], beside its negative: [1, n, 2]."""
    x = torch.tensor(values, dtype=dtype)[None, :, None]
    return torch.cat((x, -x), -1)


def same(got: torch.Tensor, *values: float) -> None:
    assert torch.equal(got, column(*values, dtype=got.dtype))


LETTERS = column(0, 1, 2, 3, 4, 5, 6, 7, 0)  # the tokens of the example


def test_rows_are_placed_and_restored(example):
    placed = example.place(LETTERS + 10 * (LETTERS == 0))
    same(placed, 0, 0, 1, 2, 3, 0, 0, 0, 4, 5, 6, 7)
    same(example.restore(placed + 10 * (placed == 0)), 0, 1, 2, 3, 4, 5, 6, 7, 0)
    plain = layout_of(1, 3, 4)
    same(plain.place(column(1, 2, 3)), 1, 2, 3, 0)
    same(plain.restore(column(1, 2, 3, 9)), 1, 2, 3)
    assert plain.place(torch.tensor([[1, 2, 3]])).tolist() == [[1, 2, 3, 0]]
    whole = column(1, 2, 3, 4)
    assert layout_of(1, 4, 4).place(whole) is whole


def test_inputs_of_a_convolution_reach_back_over_the_call(example):
    extended = example.extend(example.place(LETTERS), column(0, 8, 9, dtype=torch.bfloat16), 3)
    same(extended, 0, 0, 0, 8, 9, 1, 2, 3, 0, 0, 0, 4, 5, 6, 7)
    same(example.tail(extended, 3), 5, 6, 7)
    same(example.extend(column(*range(12)), None, 2), 0, 0, *range(12))
    short = layout_of(1, 2, 4)
    extended = short.extend(short.place(column(1, 2)), column(6, 7, 8), 3)
    same(extended, 6, 7, 8, 1, 2, 0, 0)
    same(short.tail(extended, 3), 0, 1, 2)  # what was before the document is not known
    assert short.extend(torch.zeros(1, 4, 2), column(6, 7, dtype=torch.float64), 2).dtype == torch.float32
    later = layout_of(1, 2, 4, position=torch.tensor([4]))
    same(later.tail(later.extend(later.place(column(1, 2)), column(6, 7, 8), 3), 3), 8, 1, 2)


def test_the_window_before_a_call_comes_out_of_its_ring(example):
    """Eight entries, the two tokens before at 0 and 1; after the call, the four of the last document."""
    ring = column(8, 9, 0, 0, 0, 0, 0, 0, dtype=torch.bfloat16)
    history = example.history(ring, example.place(LETTERS), 8)
    same(history, 8, 9, 0, 0, 0, 0, 0, 0, 8, 9, 1, 2, 3, 0, 0, 0, 4, 5, 6, 7)
    same(example.ring(history, 8), 4, 5, 6, 7, 0, 0, 0, 0)
    same(example.ring(example.history(column(8, 9), example.place(LETTERS), 2), 2), 6, 7)
    position, segment = example.sources(8)
    assert position[0].tolist() == [*range(-8, 0), *range(8), *range(4)]
    assert segment[0].tolist() == [-1] * 8 + [0] * 8 + [1] * 4
    same(example.history(None, column(*range(12)), 3), 0, 0, 0, *range(12))


def test_summaries_have_a_ring_of_their_own(example):
    history = example.history(column(8, 9), column(1, 2, 3), 2, 4)
    same(history, 8, 9, 1, 2, 3)
    same(example.ring(history, 2, 4), 3, 0)
    position, segment = example.sources(2, 4)
    assert position[0].tolist() == [-5, -1, 3, 7, 3]
    assert segment[0].tolist() == [-1, -1, 0, 0, 1]


def test_a_ring_in_the_middle_of_a_stream():
    """Ten tokens came before, in chunks of 4: a ring of 8 holds 2 to 9, and 8 and 9 are of the chunk in progress."""
    ring = column(80, 90, 20, 30, 40, 50, 60, 70)
    layout = layout_of(1, 3, 4, position=torch.tensor([10]))
    assert (layout.packed, layout.continued, layout.whole) == (False, True, False)
    history = layout.history(ring, layout.place(column(100, 110, 120)), 8)
    same(history, 80, 90, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 0, 0, 0)
    same(layout.ring(history, 8), 80, 90, 100, 110, 120, 50, 60, 70)
    position, segment = layout.sources(8)
    assert position[0].tolist() == list(range(16))
    assert segment[0].tolist() == [0] * 16
    aligned = layout_of(1, 4, 4, position=torch.tensor([8]))
    history = aligned.history(ring.double(), column(1, 2, 3, 4), 8)
    assert history.dtype == torch.float32
    same(history, 80, 90, 20, 30, 40, 50, 60, 70, 1, 2, 3, 4)
    assert aligned.sources(8)[1][0].tolist() == [0] * 12
    assert layout_of(1, 4, 4).sources(2)[1][0].tolist() == [-1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("position", [8, 10])
def test_a_row_of_padding_keeps_its_ring(position):
    mask = torch.tensor([[True] * 2, [False] * 2])
    layout = layout_of(2, 2, 4, position=torch.tensor([position] * 2), mask=mask)
    ring = column(1, 2, 3, 4, 5, 6, 7, 8).expand(2, -1, -1)
    history = layout.history(ring, torch.zeros(2, layout.slots, 2), 8)
    assert torch.equal(layout.ring(history, 8)[1], ring[1])


def test_blocks_overlap_by_what_a_query_reaches():
    assert blocks(column(*range(10)), 2, 2, 6)[0, :, :, 0].tolist() == [[*range(8)], [*range(2, 10)]]
    assert blocks(column(*range(10)), 2, 2, 6, 4)[0, :, :, 0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]


def test_tables_are_made_once_for_what_they_are_asked(example):
    assert example.rope(4, 1e4, torch.float32) is example.rope(4, 1e4, torch.float32)
    plain = layout_of(2, 6, 4)
    assert plain.rope(4, 1e4, torch.float32)[0].shape == (1, 8, 1, 4)  # one row for all
    later = layout_of(2, 4, 4, position=torch.tensor([4, 8]))
    for layout in (example, plain, later):
        for of in (
            (4, 1e4, torch.float64),
            (2, 1e4, torch.float64),
            (4, 100.0, torch.float64),
            (4, 1e4, torch.float32),
        ):
            for got, expected in zip(layout.rope(*of), rope_table(layout.position, *of), strict=True):
                assert got.dtype == of[-1]
                assert torch.equal(got.expand_as(expected), expected)
    masks = [plain.reachable(*of) for of in ((8, 1, 0, 8), (8, 1, 4, 4), (4, 1, 0, 4), (2, 4, 4, 4))]
    assert [int(mask.sum()) for mask in masks] == [36, 10, 26, 1]
    assert plain.reachable(8, 1, 0, 8) is masks[0]
    assert all(mask.shape[0] == 1 for mask in masks)
    assert later.reachable(4, 1, 0, 4).shape[0] == 2


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
    with pytest.raises(StateError, match=r"^mask must have the shape of the tokens \(2, 3\), got \(2, 4\)$"):
        layout_of(2, 3, 4, mask=torch.ones(2, 4))
    with pytest.raises(StateError, match=r"^document_ids must have the shape of the tokens \(2, 3\), got \(3,\)$"):
        layout_of(2, 3, 4, document_ids=torch.ones(3))
    with pytest.raises(StateError, match=r"^document_ids must be at least 0, got -2$"):
        layout_of(1, 3, 4, document_ids=torch.tensor([[0, -2, 1]]))
