"""The eidetic set: streaming top-E is ranking the whole past."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from bmojo.memory.eidetic import compact_positions, keep_best, select_chunked, select_naive
from bmojo.memory.layout import make_layout


@st.composite
def selections(draw: st.DrawFn):
    """Scores, a layout, and maybe held slots; ties are common."""
    chunk, slots, time = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 18))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    given, held = {}, None
    if draw(st.booleans()):
        position = torch.tensor(draw(st.lists(st.integers(0, 14), min_size=2, max_size=2)))
        given |= {"position": position, "document": torch.zeros(2, dtype=torch.int64)}
        where = torch.full((2, slots), -1)
        for b in range(2):  # held are admissible tokens of the chunks that were whole
            past = torch.randperm(int(position[b]) // chunk * chunk, generator=generator)[:slots]
            where[b, : len(past)] = past
        held = torch.randint(2, 5, (2, slots), generator=generator).double() / 4, where
    if draw(st.booleans()):
        given["mask"] = torch.rand(2, time, generator=generator) < 0.7
    if draw(st.booleans()):
        given["document_ids"] = (torch.rand(2, time, generator=generator) < 0.15).cumsum(1)
    layout = make_layout(2, time, chunk, torch.device("cpu"), **given)
    score = torch.rand(2, layout.slots, generator=generator).double()
    if draw(st.booleans()):
        score = (score * 5).floor() / 4
    decay = draw(st.sampled_from((1.0, 0.9)))
    if held is not None:  # the best first, ties to the newer
        worth = (held[0].log() - held[1] * math.log(decay)).masked_fill(held[1] < 0, -torch.inf)
        order = (worth + 1e-6 * held[1]).argsort(1, descending=True)
        held = held[0].gather(1, order), held[1].gather(1, order)
    options = {"decay": decay, "threshold": draw(st.sampled_from((0.0, 0.5))), "held": held}
    return score, layout, slots, options


@given(selections())
def test_streaming_selection_equals_ranking_the_past(case):
    score, layout, slots, options = case
    got, expected = select_chunked(score, layout, slots, **options), select_naive(score, layout, slots, **options)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2][1], expected[2][1])
    filled, last = expected[1] >= 0, expected[2][1] >= 0
    assert torch.equal(got[0][filled], expected[0][filled])
    for a, b in ((got[2][0], expected[2][0]), (got[2][2], expected[2][2])):
        assert torch.equal(a[last], b[last])
    first = 0 if options["held"] is None else slots
    assert ((got[0] >= 0) & (got[0] < first + layout.slots)).all()  # an empty slot too points at something


def best(score, position, slots=2, now=10, decay=1.0, threshold=0.0):
    order, is_one = keep_best(
        torch.tensor([score]), torch.tensor([position]), torch.tensor([now]), slots, decay=decay, threshold=threshold
    )
    return [position[i] for i, one in zip(order[0].tolist(), is_one[0].tolist(), strict=True) if one]


def test_what_the_slots_keep():
    assert best([0.1, 0.9, 0.5], [9, 8, 7]) == [8, 7]
    assert best([0.5, 0.5, 0.5], [9, 8, 7]) == [9, 8]  # ties to the newer
    assert best([0.5, 0.9, 0.0], [9, -1, 7], slots=3) == [9, 7]  # -1 is no token; a score of 0 is one
    assert best([0.5, 0.9, 0.3], [9, 8, 7], slots=3, threshold=0.5) == [8, 9]
    assert best([0.5, 0.9], [9, 1], decay=0.9) == [9, 1]  # 0.9 * 0.9^9 < 0.5 * 0.9
    assert best([0.5, 0.9], [9, 1], decay=0.9, now=10**6) == [9, 1]  # the order does not depend on the age of both


def test_compact_positions_bound_the_distance():
    positions = torch.tensor([[70, 3, -1, 40]])
    turned = compact_positions(positions, torch.tensor([100]), reach=20)
    assert turned[0, [1, 3, 0]].tolist() == [76, 77, 78]  # oldest first, right behind window and fading span
    later = compact_positions(positions, torch.tensor([10**6]), reach=20)
    assert torch.equal(later - 10**6, turned - 100)
