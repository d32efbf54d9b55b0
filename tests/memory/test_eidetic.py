"""The eidetic set: streaming top-E is ranking the whole past."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmojo.memory import eidetic_cpu
from bmojo.memory.eidetic import compact_positions, keep_best, select_chunked, select_naive
from bmojo.memory.layout import make_layout

each_form = pytest.mark.parametrize("form", [select_chunked, select_naive, eidetic_cpu.select])


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


def same(got, expected):
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@given(selections(), st.booleans(), st.sampled_from((torch.float32, torch.float64)))
def test_the_kernel_makes_the_same_sets_in_the_same_order(case, broken, dtype):
    """Bit for bit, empty slots too, and where scores are no numbers."""
    score, layout, slots, options = case
    score = score.to(dtype)
    if broken:
        score[:, ::3], score[0, 1:2], score[1, 2:3] = torch.nan, torch.inf, -torch.inf
    if options["held"] is not None:
        options["held"] = options["held"][0].to(dtype), options["held"][1]
    same(eidetic_cpu.select(score, layout, slots, **options), select_chunked(score, layout, slots, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [1.0, 0.999, 0.3])
@pytest.mark.parametrize("slots", [1, 32, 200])
def test_the_kernel_ranks_as_pytorch_does(slots, decay, dtype):
    """The age is multiplied by the decay's logarithm, and subtracted: each is rounded, and that decides near ties."""
    generator = torch.Generator().manual_seed(0)
    position = torch.tensor([0, 10**6])
    layout = make_layout(2, 1024, 32, torch.device("cpu"), position=position, document=position * 0)
    held = torch.rand(2, slots, generator=generator, dtype=dtype), torch.full((2, slots), -1)
    held[1][1] = torch.randperm(10**6, generator=generator)[:slots]
    score = torch.randint(1, 4, (2, layout.slots), generator=generator).to(dtype) / 4
    score = score * decay ** (layout.position % 64).to(dtype).neg()  # many tie, or would if nothing were rounded
    options = {"decay": decay, "threshold": 0.1, "held": held}
    same(eidetic_cpu.select(score, layout, slots, **options), select_chunked(score, layout, slots, **options))


def test_the_kernel_as_compilers_see_it():
    layout = make_layout(2, 12, 4, torch.device("cpu"))
    score = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    position, complete = torch.cat((torch.full((2, 3), -1), layout.position), 1), layout.complete.contiguous()
    value = torch.nn.functional.pad(score, (3, 0))
    for resets in (None, torch.zeros_like(complete)):
        args = (value, position, complete, resets, 3, 4, 0.1)
        torch.library.opcheck(torch.ops.bmojo.select.default, args, test_utils=("test_schema", "test_faketensor"))

    def call(score):
        return eidetic_cpu.select(score, make_layout(2, 12, 4, score.device), 3, decay=0.9, threshold=0.1)

    same(torch.compile(call, backend="aot_eager", fullgraph=True)(score), call(score))


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


def test_the_age_does_not_cost_the_order_of_float64():
    score, position = torch.tensor([[0.5, 0.5 / 0.9 * (1 + 1e-6)]], dtype=torch.float64), torch.tensor([[9, 8]])
    for now in (10, *range(10**6, 10**6 + 9)):
        order, _ = keep_best(score, position, torch.tensor([now]), 2, decay=0.9, threshold=0.0)
        assert order.tolist() == [[1, 0]]


def test_many_ties_go_to_the_newer():
    newest_first = list(range(99, -1, -1))
    assert best([0.5] * 100, newest_first, slots=7, now=100) == newest_first[:7]


@each_form
@pytest.mark.parametrize(
    ("case", "score", "given", "held", "options", "sets"),
    [
        # what the call brings: position and document of the state, documents of the tokens; the positions in the slots
        # of every chunk and, last, after the call
        ("from nothing", [0.5, 0.1, 0.9, 0.5, 0.2, 0.3], {}, None, {}, [[-1, -1], [0, 1], [2, 3], [2, 3]]),
        ("an incomplete chunk waits", [0.5, 0.1, 0.9], {}, None, {}, [[-1, -1], [0, 1], [0, 1]]),
        ("decay", [0.9, 0.6], {}, None, {"decay": 0.5}, [[-1, -1], [1, 0]]),
        ("threshold", [0.9, 0.3, 0.2, 0.1], {}, None, {"threshold": 0.3}, [[-1, -1], [0, 1], [0, 1]]),
        ("held", [0.6, 0.9, 1.0], {"position": 4}, ([0.8, 0.4], [1, 3]), {}, [[1, 3], [5, 1], [5, 1]]),
        ("held ties", [0.1, 0.2], {"position": 4}, ([0.5, 0.5], [3, 1]), {}, [[3, 1], [3, 1]]),
        ("held decays", [0.1, 0.6], {"position": 4}, ([0.9, 0.8], [3, 1]), {"decay": 0.9}, [[3, 1], [3, 5]]),
        ("one slot is empty", [0.1, 0.2], {"position": 2}, ([0.5, 0.9], [1, -1]), {}, [[1, -1], [1, 3]]),
        ("in a chunk", [0.7, 0.1], {"position": 5}, ([0.5, 0.4], [1, 3]), {}, [[1, 3], [4, 1]]),
        ("a new document", [0.9, 0.9, 0.1, 0.2], {"position": 4, "document": 0, "document_ids": [0, 0, 1, 1]},
         ([0.5, 0.4], [1, 3]), {}, [[1, 3], [-1, -1], [1, 0]]),
        ("a document that was held alone", [0.1, 0.2], {"position": 4, "document": 0, "document_ids": [1, 1]},
         ([0.5, 0.4], [1, 3]), {}, [[-1, -1], [1, 0]]),
    ],
)  # fmt: skip
def test_sets_in_small_numbers(form, case, score, given, held, options, sets):
    """Chunks of 2, two slots."""
    one = {name: torch.tensor([value]) for name, value in given.items()}
    layout = make_layout(1, len(score) - given.get("position", 0) % 2, 2, torch.device("cpu"), **one)
    scores = torch.zeros(1, layout.slots, dtype=torch.float64)
    scores[0, : len(score)] = torch.tensor(score)
    before = (torch.tensor([held[0]], dtype=torch.float64), torch.tensor([held[1]])) if held else None
    index, position, (value, where, last) = form(
        scores, layout, 2, **{"decay": 1.0, "threshold": 0.0, **options}, held=before
    )
    assert torch.cat((position[0], where)).tolist() == sets
    known = torch.cat((before[0][0], scores[0])) if before else scores[0]
    at = torch.cat((before[1][0], layout.position[0])) if before else layout.position[0]
    for places, kept in ((position[0], index[0]), (where, last)):
        assert torch.equal(at[kept][places >= 0], places[places >= 0])  # an index leads to the token
    assert torch.equal(value[where >= 0], known[last][where >= 0])


@each_form
def test_chunks_of_one_token(form):
    layout = make_layout(1, 1, 1, torch.device("cpu"))
    _, position, (score, where, _) = form(torch.tensor([[0.5]]), layout, 2, decay=1.0, threshold=0.0)
    assert (position.tolist(), where.tolist(), score[0, 0]) == ([[[-1, -1]]], [[0, -1]], 0.5)


def test_compact_positions_bound_the_distance():
    positions = torch.tensor([[70, 3, -1, 40]])
    turned = compact_positions(positions, torch.tensor([100]), reach=20)
    assert turned[0, [1, 3, 0]].tolist() == [76, 77, 78]  # oldest first, right behind window and fading span
    later = compact_positions(positions, torch.tensor([10**6]), reach=20)
    assert torch.equal(later - 10**6, turned - 100)
