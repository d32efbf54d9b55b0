"""Joint softmax and rotary positions."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import close

from bmojo.errors import ConfigError
from bmojo.ops import dispatch
from bmojo.ops.attention import attend, attend_chunked, attend_naive
from bmojo.ops.numerics import repeat_groups
from bmojo.ops.rope import rope_table, rotate


def qkv(heads: int, kv_heads: int, queries: int = 5, keys: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(2, *shape, 4, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("masked", ["causal", "mask", "none"])
def test_chunked_equals_naive(heads, kv_heads, masked):
    q, k, v = qkv(heads, kv_heads, 6, 6)
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    options = {"causal": {"causal": True}, "mask": {"mask": mask}, "none": {}}[masked]
    close(attend_chunked(q, k, v, **options), attend_naive(q, k, v, **options), 1e-12)


@pytest.mark.parametrize("form", [attend_naive, attend_chunked])
def test_an_empty_set_gives_zero_and_a_finite_gradient(form):
    q, k, v = (z.requires_grad_() for z in qkv(2, 2))
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1:, 0] = True
    out = form(q, k, v, mask)
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    close(out[:, :, 1], v[:, :, 0])
    out.square().sum().backward()
    assert all(bool(z.grad.isfinite().all()) for z in (q, k, v))


def test_scores_depend_on_distance_alone_even_far_out():
    q, k = (torch.randn(1, 8, dtype=torch.float64) for _ in range(2))

    def score(i: int, j: int) -> torch.Tensor:
        return (
            rotate(q, rope_table(torch.tensor(i), 8, 1e4, q.dtype))
            * rotate(k, rope_table(torch.tensor(j), 8, 1e4, q.dtype))
        ).sum()

    for shift in (-7, 1000, 10**6):
        close(score(9 + shift, 4 + shift), score(9, 4), 1e-9)
    far = rope_table(torch.tensor(10**7), 8, 1e4, torch.float32)
    close(far[0].double(), rope_table(torch.tensor(10**7), 8, 1e4, torch.float64)[0], 1e-7)
    table = rope_table(torch.arange(3), 8, 1e4, torch.float64)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    close(rotate(rotate(x, table), rope_table(-torch.arange(3), 8, 1e4, torch.float64)), x)


def test_consecutive_heads_share_a_group():
    x = torch.arange(2.0)[:, None]
    assert repeat_groups(x, 4)[:, 0].tolist() == [0, 0, 1, 1]
    assert repeat_groups(x, 2) is x


def test_the_backend_is_chosen_in_one_place_and_logged_once(caplog):
    q, k, v = qkv(1, 1)
    with caplog.at_level(logging.INFO, logger="bmojo.ops"), dispatch.use_backend("naive"):
        assert torch.equal(attend(q, k, v), attend_naive(q, k, v))
        attend(q, k, v)
    assert [record.message for record in caplog.records] == ["sequence ops run in their naive form"]
    assert torch.equal(attend(q, k, v), attend_chunked(q, k, v))
    with pytest.raises(ConfigError, match="did you mean 'chunked'"), dispatch.use_backend("chunkd"):
        pass
