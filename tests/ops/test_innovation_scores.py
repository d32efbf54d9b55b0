"""Innovation scores: forms agree, padding and resets leave no trace, and the scores mean what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close

from bmojo.ops import innovation as ops
from bmojo.ops import innovation_cpu

CHUNK, DIM = 4, 5
each_rls = pytest.mark.parametrize("rls", [ops.rls_chunked, innovation_cpu.rls])


def features(time: int, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    return F.normalize(
        torch.randn(2, time, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


@each_rls
@pytest.mark.parametrize("forgetting", [1.0, 0.995, 0.7])
@pytest.mark.parametrize("packed", [False, True])
def test_rls_equals_naive_and_steps(rls, forgetting, packed):
    k, valid = features(6 * CHUNK), torch.ones(2, 6 * CHUNK, dtype=torch.bool)
    resets = torch.zeros(2, 6, dtype=torch.bool)
    if packed:  # documents end inside chunks, the call begins inside one and ends inside one
        valid[0, [0, 1, 11, 23]] = valid[1, 5:8] = valid[1, 14:] = False
        resets[0, 3] = resets[1, 2] = True
    start = ops.rls_start(2, DIM, k)
    options = {"chunk_size": CHUNK, "forgetting": forgetting, "resets": resets if packed else None}
    scores, A, M = rls(k, valid, *start, **options)
    naive = ops.rls_naive(k, valid, *start, **options)
    for got, want in zip((scores, A, M), naive, strict=True):
        close(got, want, 1e-11)
    assert ((scores >= 0) & (scores < 1)).all()
    if not packed:
        A, M = start
        for t in range(k.shape[1]):
            score, A, M = ops.rls_step(k[:, t], A, M, torch.full((2,), t % CHUNK == CHUNK - 1), forgetting=forgetting)
            close(score, naive[0][:, t], 1e-11)


@each_rls
def test_rls_scores_what_is_new_above_what_was_seen(rls):
    k = torch.eye(DIM, dtype=torch.float64)[[0, 0, 0, 0, 0, 1, 0, 1]][None]
    scores = rls(k, torch.ones(1, 8, dtype=torch.bool), *ops.rls_start(1, DIM, k), chunk_size=CHUNK, forgetting=0.99)[
        0
    ][0]
    assert scores[0] > 0.9
    close(scores[5], scores[0], 1e-4)  # a direction never seen, whenever it comes; rho grows by tr(A) / 1e5
    assert (scores[1:5].diff() < 0).all()
    assert scores[7] < scores[5]


@each_rls
@pytest.mark.parametrize(("dim", "chunk"), [(1, 3), (8, 16), (33, 7), (64, 32)])  # with and without whole vectors
def test_rls_of_any_size(rls, dim, chunk):
    k, valid = features(3 * chunk, dim=dim), torch.rand(2, 3 * chunk, generator=torch.Generator().manual_seed(1)) < 0.8
    start, options = ops.rls_start(2, dim, k), {"chunk_size": chunk, "forgetting": 0.98}
    expected = ops.rls_naive(k, valid, *start, **options)
    for got, want in zip(rls(k, valid, *start, **options), expected, strict=True):
        close(got, want, 1e-11)
    single = rls(k.float(), valid, *(z.float() for z in start), **options)
    for got, want, tolerance in zip(single, expected, (2e-6, 1e-5, 1e-5), strict=True):
        assert got.dtype == torch.float32
        close(got.double(), want, tolerance)
    half = rls(k.bfloat16(), valid, *(z.float() for z in start), **options)
    assert {z.dtype for z in half} == {torch.float32}


@each_rls
def test_rls_in_float32_where_the_precision_is_ill_conditioned(rls):
    """4,000 tokens in a plane, one that leaves it, nothing forgotten: M has a condition number of 1e4."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 4096, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    k[:, 4000] = torch.randn(32, generator=generator)
    k, valid, options = F.normalize(k, dim=-1), torch.ones(1, 4096, dtype=torch.bool), {"chunk_size": 64}
    expected, _, M = ops.rls_chunked(k.double(), valid, *ops.rls_start(1, 32, k.double()), **options, forgetting=1.0)
    assert torch.linalg.cond(M) > 1e4
    scores = rls(k, valid, *ops.rls_start(1, 32, k), **options, forgetting=1.0)[0]
    assert (scores - expected).abs().max() < 1e-4
    assert ((scores - expected).abs() / expected).max() < (2e-3 if rls is ops.rls_chunked else 2e-4)
    assert expected[0, 4000] > 0.8


def test_rls_in_cpp_what_is_not_a_number_stays_in_its_row_and_in_its_future():
    k, valid = features(3 * CHUNK), torch.ones(2, 3 * CHUNK, dtype=torch.bool)
    valid[1, 5] = False
    options = {"chunk_size": CHUNK, "forgetting": 0.9}
    expected = innovation_cpu.rls(k, valid, *ops.rls_start(2, DIM, k), **options)
    for bad in (torch.nan, torch.inf):
        k[0, 5, 2] = k[1, 5, 2] = bad  # a token, and padding
        scores, A, M = innovation_cpu.rls(k, valid, *ops.rls_start(2, DIM, k), **options)
        assert torch.equal(scores[0, :5], expected[0][0, :5])
        assert scores[0, 5:].isnan().all()
        for got, want in zip((scores, A, M), expected, strict=True):
            assert torch.equal(got[1], want[1])
        assert not A[0].isfinite().all()
    start, broken = ops.rls_start(2, DIM, k), -torch.eye(DIM, dtype=k.dtype).expand(2, -1, -1)
    scores = innovation_cpu.rls(features(CHUNK), valid[:, :CHUNK], start[0], broken, **options)[0]
    assert scores.isnan().all()  # a precision that is none


def test_rls_in_cpp_refuses_what_it_would_read_beyond():
    k, valid = features(2 * CHUNK), torch.ones(2, 2 * CHUNK, dtype=torch.bool)
    for size, chunk, message in ((DIM, CHUNK + 1, "a multiple of 5 tokens, got 8"), (DIM + 1, CHUNK, "tensor of")):
        with pytest.raises(RuntimeError, match=message):
            innovation_cpu.rls(k, valid, *ops.rls_start(2, size, k), chunk_size=chunk, forgetting=0.9)


def test_rls_in_cpp_as_compilers_see_it():
    k, valid = features(4 * CHUNK), torch.ones(2, 4 * CHUNK, dtype=torch.bool)
    for resets in (None, torch.zeros(2, 4, dtype=torch.bool)):
        args = (k, valid, *ops.rls_start(2, DIM, k), resets, CHUNK, 0.9, ops.RLS_RIDGE, ops.RLS_CONDITION)
        torch.library.opcheck(torch.ops.bmojo.rls.default, args, test_utils=("test_schema", "test_faketensor"))
    run = torch.compile(innovation_cpu.rls, backend="aot_eager", fullgraph=True)
    options = {"chunk_size": CHUNK, "forgetting": 0.9}
    for got, want in zip(*(f(*args[:4], **options) for f in (run, innovation_cpu.rls)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forgetting", [0.995, 0.5])
def test_ema_equals_its_steps_with_padding_and_resets(forgetting, dtype):
    x = features(4 * CHUNK).to(dtype)
    valid, resets = torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    valid[0, 6:8], resets[0, 2], valid[1, 14:] = False, True, False
    scores, mean = ops.ema(x, valid, None, chunk_size=CHUNK, forgetting=forgetting, resets=resets)
    assert scores.dtype == mean.dtype == dtype
    for row in range(2):
        state = torch.zeros(1, DIM, dtype=dtype)
        for t in range(16):
            if t % CHUNK == 0 and resets[row, t // CHUNK]:
                state = torch.zeros_like(state)
            if valid[row, t]:
                score, state = ops.ema_step(x[row, t][None], state, forgetting=forgetting)
                close(scores[row, t][None], score, 1e-5 if dtype == torch.float32 else 1e-11)
            else:
                assert scores[row, t] == 0
        close(mean[row][None], state, 1e-5 if dtype == torch.float32 else 1e-11)
    assert scores[0, 0] == scores[0, 8] == 1


def test_ema_without_forgetting_is_the_plain_mean():
    x = features(8)
    scores, _ = ops.ema(x, torch.ones(2, 8, dtype=torch.bool), None, chunk_size=CHUNK, forgetting=1.0)
    close(scores[:, -1], 1 - F.cosine_similarity(x[:, -1], x[:, :-1].mean(1), dim=-1))


def test_relative_error_of_a_zero_value_is_zero():
    value, predicted = (
        torch.tensor([[0.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[3.0, 1.0], [1.0, 1.0]], requires_grad=True),
    )
    error = ops.relative_error(value, predicted)
    assert error.tolist() == [0, 0.5]
    error.sum().backward()
    assert predicted.grad[0].tolist() == [0, 0]


def test_position_scores_look_at_positions_alone():
    position = torch.arange(-1, 4000)
    recent, first, random = (ops.position_score(kind, position, 0) for kind in ("recent", "first", "random"))
    assert (recent == 1).all()
    assert (first[1:].diff() < 0).all()
    assert random[7] == ops.position_score("random", position[7:8], 0)
    assert ((random >= 0) & (random < 1)).all()
    assert abs(random.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack((random[1:-1], random[2:])))[0, 1]) < 0.05
    assert not torch.equal(random, ops.position_score("random", position, 1))
    assert len(random[1:].unique()) > 3990


def test_random_scores_stay_what_they_are():
    """A saved state goes on with the scores that it began with, whatever the version: the values are part of it."""
    position = torch.tensor([-1, 0, 1, 2, 3, 1000, 10**6, 2**31])
    expected = {
        0: [15529821, 15529821, 7819731, 13887003, 7611771, 11030060, 3508615, 10844245],
        7: [4639944, 4639944, 2116567, 1028536, 7081801, 1829171, 10119040, 13904752],
    }
    for seed, values in expected.items():
        assert (ops.position_score("random", position, seed) * 2**24).tolist() == values


@each_rls
def test_leverage_in_small_numbers(rls):
    """Two chunks of one token in one dimension: M = 0.1, then g k^2 + 0.1 + k^2 / 1e5."""
    k, g = torch.tensor([[[1.0], [1.0]]], dtype=torch.float64), 0.5
    A, M = ops.rls_start(1, 1, k)
    assert A.dtype == M.dtype == torch.float64
    assert (A.item(), M.item()) == (0, 0.1)
    scores, A, M = rls(k, torch.ones(1, 2, dtype=torch.bool), A, M, chunk_size=1, forgetting=g)
    second = 1 / (g + 0.1 + 1e-5)
    close(scores[0], torch.tensor([10 / 11, second / (1 + second)], dtype=torch.float64), 1e-14)
    close(A[0, 0], torch.tensor([1 + g], dtype=torch.float64), 1e-14)
    close(M[0, 0], torch.tensor([g * (1 + g) + 0.1 + (1 + g) / 1e5], dtype=torch.float64), 1e-14)


def test_distance_in_small_numbers():
    x, past = (
        torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 0]]),
        torch.tensor([[2.0, 0], [-1, 0], [0, 1], [0, 0], [1, 0]]),
    )
    assert ops.cosine_distance(x, past).tolist() == [0, 2, 1, 1, 1]
    assert ops.cosine_distance(x.bfloat16(), past).dtype == torch.float32
