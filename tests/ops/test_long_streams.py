"""Scores stay finite where a stream is long, monotonous or never forgotten."""

import pytest
import torch

from bmojo.ops import innovation as ops
from bmojo.ops import innovation_cpu

each_rls = pytest.mark.parametrize("rls", [ops.rls_chunked, innovation_cpu.rls])


@each_rls
@pytest.mark.parametrize("forgetting", [0.999, 1.0])
def test_rls_factors_a_million_equal_tokens_in_float32(rls, forgetting):
    k = torch.nn.functional.normalize(torch.ones(1, 64, 32), dim=-1)
    A, M = ops.rls_start(1, 32, k)
    A = A + 1e6 * k[:, 0, :, None] * k[:, 0, None, :]  # what forgetting=1 holds after a million of them
    valid = torch.ones(1, 64, dtype=torch.bool)
    M = ops.rls_step(k[:, 0], A, M, valid[:, 0], forgetting=forgetting)[2]
    scores, A, M = rls(k, valid, A, M, chunk_size=64, forgetting=forgetting)
    assert torch.isfinite(scores).all()
    assert float(scores.max()) < 0.01
    torch.linalg.cholesky(M)


@each_rls
def test_rls_scores_of_nothing_are_zero(rls):
    k = torch.zeros(1, 64, 32)
    A, M = ops.rls_start(1, 32, k)
    scores, *_ = rls(k, torch.ones(1, 64, dtype=torch.bool), A, M, chunk_size=64, forgetting=0.999)
    assert torch.equal(scores, torch.zeros(1, 64))
