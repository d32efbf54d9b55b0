"""The forms for XLA against those that they stand for."""

from __future__ import annotations

import pytest
import torch
from cases import close

from bmojo.memory.eidetic import sorted_first
from bmojo.ops import xla
from bmojo.ops.dispatch import lowering_for
from bmojo.ops.gated_delta import gated_delta, gated_delta_naive, substitute
from bmojo.ops.innovation import leverage_cholesky, rls, rls_naive, rls_start, rls_step, variances_cholesky


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("chunk", "dim"), [(8, 6), (64, 32), (21, 5), (7, 3), (1, 2), (17, 1)])
def test_variances_and_leverage(chunk, dim):
    K, root = draw(2, 3, chunk, dim), draw(2, 3, dim, dim, seed=1)
    M = root @ root.mT + 0.1 * torch.eye(dim, dtype=root.dtype)
    close(xla.variances(K, M), variances_cholesky(K, M))
    close(xla.leverage(K[:, 0, 0], M[:, 0]), leverage_cholesky(K[:, 0, 0], M[:, 0]))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 21, 64])
def test_solve_unit_lower(size):
    system = torch.eye(size, dtype=torch.float64) + 0.3 * draw(2, 3, size, size).tril(-1)
    right = draw(2, 3, size, 5, seed=1)
    inputs = [x.requires_grad_() for x in (system, right)]
    expected, got = substitute(system, right), xla.solve_unit_lower(system, right)
    close(got, expected)
    weight = draw(*expected.shape, seed=2)
    (a, b), (c, d) = (torch.autograd.grad((x * weight).sum(), inputs, materialize_grads=True) for x in (got, expected))
    close(a.tril(-1), c.tril(-1))  # nothing else of the system is read
    close(b, d)


def test_solve_unit_lower_stays_exact_where_powers_of_the_system_grow():
    system = torch.ones(256, 256).tril().expand(1, -1, -1).contiguous()  # equal keys, no decay: powers reach 1e75
    right = draw(1, 256, 4).float()
    close(xla.solve_unit_lower(system, right), substitute(system, right), 1e-5)


def test_best_first_breaks_ties_as_a_stable_sort():
    value = torch.randint(0, 5, (4, 30), generator=torch.Generator().manual_seed(0)).float()
    value = value.masked_fill(value == 0, -torch.inf)
    for got, expected in zip(xla.best_first(value, 7), sorted_first(value, 7), strict=True):
        assert torch.equal(got, expected)
    index = xla.best_first(torch.full((1, 4), torch.nan), 4)[1]
    assert bool(((index >= 0) & (index < 4)).all())


def test_ops_lowered_for_xla_are_the_definitions():
    k = torch.nn.functional.normalize(draw(2, 16, 5), dim=-1)
    valid = torch.ones(2, 16, dtype=torch.bool)
    options = {"chunk_size": 8, "forgetting": 0.9}
    expected = rls_naive(k, valid, *rls_start(2, 5, k), **options)
    gate = draw(2, 16, 3, seed=3).sigmoid()
    delta = (draw(2, 16, 3, 4), *(torch.nn.functional.normalize(draw(2, 16, 3, 4, seed=s), dim=-1) for s in (1, 2)))
    reference = gated_delta_naive(*delta, gate, -gate, chunk_size=8)
    with lowering_for("xla"):
        got = rls(k, valid, *rls_start(2, 5, k), **options)
        score, *_ = rls_step(k[:, 0], *rls_start(2, 5, k), torch.zeros(2, dtype=torch.bool), forgetting=0.9)
        lowered = gated_delta(*delta, gate, -gate, chunk_size=8)
    for ours, theirs in zip((*got, score, *lowered), (*expected, expected[0][:, 0], *reference), strict=True):
        close(ours, theirs, 1e-9)
