"""One token against rings and caches, in small numbers."""

from __future__ import annotations

import pytest
import torch

from bmojo.memory.layout import make_layout
from bmojo.memory.spec import CACHE_BLOCK
from bmojo.memory.step import Step, grow
from bmojo.ops.rope import rope_table


def step_at(*positions: int, chunk: int = 4, donate: bool = False) -> Step:
    position = torch.tensor(positions)
    return Step(position, torch.zeros_like(position), chunk, donate)


def test_a_token_ends_its_chunk():
    at = step_at(2, 3, 8)
    assert at.next_position.tolist() == [3, 4, 9]
    assert at.ends_chunk.tolist() == [False, True, False]
    assert at.any_ends_chunk is True
    assert step_at(0, 6).any_ends_chunk is False


@pytest.mark.parametrize("donate", [False, True])
def test_a_ring_takes_a_token_at_its_position(donate):
    ring, value = torch.zeros(2, 3, 2, dtype=torch.bfloat16), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = step_at(4, 2, donate=donate).put_in_ring(ring, value)
    assert got.dtype == torch.bfloat16
    assert got[0].tolist() == [[0, 0], [1, 2], [0, 0]]
    assert got[1].tolist() == [[0, 0], [0, 0], [3, 4]]
    assert (got is ring) == donate
    assert bool(ring.any()) == donate


def test_a_ring_of_summaries_takes_the_last_token_of_a_chunk():
    ring, value = torch.zeros(3, 2, 2, dtype=torch.bfloat16), torch.ones(3, 2)
    got = step_at(3, 7, 8).put_in_ring(ring, value, stride=4)
    assert got.dtype == torch.bfloat16
    assert got[..., 0].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert step_at(1, 2, 4).put_in_ring(ring, value, stride=4) is ring
    single = torch.zeros(3, 2)  # rows of one number
    assert step_at(3, 7, 8).put_in_ring(single, torch.ones(3), stride=4).tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("stride", "size", "nearest", "span"), [(1, 8, 0, 8), (1, 8, 3, 5), (1, 5, 2, 2), (4, 3, 8, 4)]
)
def test_a_token_reaches_what_the_chunked_form_reaches(stride, size, nearest, span):
    """The entries that a ring may hold, as positions, against the definition and against `Layout`."""
    for here in range(30):
        at = step_at(here)
        ring = torch.full((size,), -1)
        for position in range(stride - 1, here + 1, stride):
            ring[position // stride % size] = position
        mask = at.reachable(size, stride, nearest, span)
        assert mask.shape == (1, size)
        wanted = [p for p in ring.tolist() if p >= 0 and here - nearest - span < p <= here - nearest]
        assert ring[mask[0]].tolist() == wanted
        layout = make_layout(1, here + 1, 4, torch.device("cpu"))
        if (nearest + span) % 4 == nearest % 4 == 0:  # what a layer asks for
            size_before = (nearest + span) // stride
            seen = layout.reachable(size_before, stride, nearest, span)[0, here // 4, here % 4]
            assert int(seen.sum()) == len(wanted)


def test_masks_and_tables_are_made_once_for_what_they_are_asked():
    at = step_at(5, 2)
    assert at.reachable(8, 1, 0, 8) is at.reachable(8, 1, 0, 8)
    masks = [at.reachable(*of) for of in ((8, 1, 0, 8), (8, 1, 0, 2), (8, 1, 2, 2), (4, 1, 0, 8), (8, 4, 0, 8))]
    assert [mask.sum(1).tolist() for mask in masks] == [[6, 3], [2, 2], [2, 1], [4, 3], [1, 0]]
    assert at.reachable_in_cache(7).tolist() == [[True] * 6 + [False], [True] * 3 + [False] * 4]
    assert at.reachable_in_cache(3).tolist() == [[True] * 3, [True] * 3]
    for of in ((4, 1e4, torch.float64), (2, 1e4, torch.float64), (4, 100.0, torch.float64), (4, 1e4, torch.float32)):
        for got, expected in zip(at.rope(*of), rope_table(at.position, *of), strict=True):
            assert got.dtype == of[-1]
            assert torch.equal(got, expected)


def test_a_cache_grows_by_whole_blocks():
    rows = torch.arange(1.0, 4.0).view(1, 3, 1).expand(2, 3, 2)
    for length, expected in ((1, CACHE_BLOCK), (CACHE_BLOCK, CACHE_BLOCK), (CACHE_BLOCK + 1, 2 * CACHE_BLOCK)):
        grown = grow(rows, length)
        assert grown.shape == (2, expected, 2)
        assert torch.equal(grown[:, :3], rows)
        assert not grown[:, 3:].any()
    assert grow(grown, 5) is grown  # never shorter
    assert grow(grown, 2 * CACHE_BLOCK) is grown
    assert step_at(CACHE_BLOCK - 1, 3).room(rows).shape[1] == CACHE_BLOCK
    assert step_at(CACHE_BLOCK, 3).room(rows).shape[1] == 2 * CACHE_BLOCK
