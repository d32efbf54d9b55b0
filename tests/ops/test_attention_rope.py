"""Joint softmax and rotary positions."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import close

from bmojo.errors import ConfigError
from bmojo.ops import dispatch
from bmojo.ops.attention import attend, attend_chunked, attend_naive, largest_weights
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


@pytest.mark.parametrize("form", [attend_naive, attend_chunked])
def test_attention_in_small_numbers(form):
    """One query of length 4: q . k / 2 = ln 1, ln 3 and, where it is visible, ln 4."""
    k = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    k[0, 0, :, 0] = 2 * torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64).log()
    q = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(1, 1, 3, 4)
    v = torch.eye(3, dtype=torch.float64)[None, None]
    close(form(q, k, v)[0, 0, 0], torch.tensor([1.0, 3, 4]) / 8, 1e-14)
    close(form(q, k, v, torch.tensor([[True, True, False]]))[0, 0, 2], torch.tensor([1.0, 3, 0]) / 4, 1e-14)
    causal = torch.tensor([[1.0, 0, 0], [1 / 4, 3 / 4, 0], [1 / 8, 3 / 8, 4 / 8]], dtype=torch.float64)
    close(form(q, k, v, causal=True)[0, 0], causal, 1e-14)


def test_rows_of_very_different_scores_keep_their_digits():
    q, k, v = qkv(2, 2)
    q[:, :, 0] *= 1e5
    q[:, :, 1] *= 1e-5
    close(attend_naive(q, k, v), attend_chunked(q, k, v), 1e-12)


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


def test_a_table_in_small_numbers():
    cos, sin = rope_table(torch.tensor([0, 3]), 4, 100.0, torch.float64)
    angles = torch.tensor([[[0.0] * 4], [[3, 0.3, 3, 0.3]]], dtype=torch.float64)
    assert cos.shape == sin.shape == (2, 1, 4)
    close(cos, angles.cos(), 1e-15)
    close(sin, angles.sin(), 1e-15)
    x = torch.tensor([1.0, 10, 100, 1000], dtype=torch.float64)
    c, s = angles[1, 0].cos(), angles[1, 0].sin()
    turned = [c[0] - 100 * s[0], 10 * c[1] - 1000 * s[1], 100 * c[0] + s[0], 1000 * c[1] + 10 * s[1]]
    close(rotate(x[None, None], (cos[1:], sin[1:]))[0, 0], torch.stack(turned), 1e-13)
    assert rotate(x.float()[None, None], (cos[1:], sin[1:])).dtype == torch.float32


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


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_largest_weights_are_those_of_the_softmax(heads):
    q, k = torch.randn(3, heads[0], 5, 4), torch.randn(3, heads[1], 7, 4)
    mask = torch.rand(3, 1, 5, 7) < 0.7
    mask[..., 0] = True
    one = torch.eye(7).expand(3, heads[1], 7, 7)
    weights = attend(q, k, one, mask)  # values that are one-hot give the weights
    torch.testing.assert_close(largest_weights(q, k, mask, 3), weights.amax((1, 2))[:, -3:])
