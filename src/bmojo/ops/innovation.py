"""Innovation scores: how badly the past predicts a token. Causal, detached, at least 0, float32 or better.

The scores that read a state of their own:

`rls`: recursive least squares with forgetting g on unit-norm inputs k_t in R^r. At the start of a chunk the precision
is M = g A + rho I, with A = sum_j g^(age of j) k_j k_j^T; inside the chunk each token adds k k^T to it. The score is
the Kalman leverage, the share of the innovation's variance that the past does not explain:

    s_t = k_t^T M^-1 k_t / (1 + k_t^T M^-1 k_t)        in [0, 1)

(rho = 0.1 + tr(A) / 1e5 bounds M^-1, so directions that are never excited can't wind up, and the condition of M, so
that float32 can factor it however long the stream.) Inside a chunk all scores come from one Cholesky
factor: with G = K M^-1 K^T and L L^T = I + G, the variance of token t given those before it is L_tt^2, so
s_t = 1 - 1 / L_tt^2.

`ema`: cosine distance to a fading mean of the past, s_t = 1 - cos(x_t, m_{t-1}); 1 where there is no past. The mean
(up to a factor) is the simplest selective scan: one head, one state, dt = B = C = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmojo.ops.dispatch import dispatched
from bmojo.ops.numerics import at_least_float32, exact
from bmojo.ops.ssd import ssd, ssd_step

RLS_RIDGE = 0.1  # the prior precision of every direction, and
RLS_CONDITION = 1e5  # the largest condition number of M at the start of a chunk: float32 can factor it


def rls_start(batch: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A and M [batch, dim, dim] before any token."""
    A = torch.zeros(batch, dim, dim, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return A, rls_prior(A, 1.0)


def _factor(M: Tensor) -> Tensor:
    """The Cholesky factor, unchecked: a model that diverged gives NaN, and its loss tells."""
    return torch.linalg.cholesky_ex(M)[0]


def leverage_cholesky(k: Tensor, M: Tensor) -> Tensor:
    """k^T M^-1 k [batch] for k [batch, dim], M [batch, dim, dim]."""
    return (k * torch.cholesky_solve(k[..., None], _factor(M)).squeeze(-1)).sum(-1)


def variances_cholesky(K: Tensor, M: Tensor) -> Tensor:
    """1 + k_t^T M_t^-1 k_t [..., chunk] of the tokens K [..., chunk, dim], with M_t = M + sum_{j<t} k_j k_j^T."""
    whitened = torch.linalg.solve_triangular(_factor(M), K.mT, upper=False)
    gram = whitened.mT @ whitened + torch.eye(K.shape[-2], dtype=K.dtype, device=K.device)
    return _factor(gram).diagonal(dim1=-2, dim2=-1).square()


leverage = dispatched(
    chunked=leverage_cholesky,
    naive=leverage_cholesky,
    fused={"cuda": "bmojo.ops.triton_rls:leverage", "xla": "bmojo.ops.xla:leverage"},
)
variances = dispatched(chunked=variances_cholesky, naive=variances_cholesky, fused={"xla": "bmojo.ops.xla:variances"})


def rls_prior(A: Tensor, forgetting: float) -> Tensor:
    """M = g A + rho I [batch, dim, dim]."""
    rho = RLS_RIDGE + A.diagonal(dim1=-2, dim2=-1).sum(-1) / RLS_CONDITION
    return forgetting * A + torch.diag_embed(rho[:, None].expand(-1, A.shape[-1]))


@exact
def rls_step(
    k: Tensor, A: Tensor, M: Tensor, ends_chunk: Tensor, *, forgetting: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token k [batch, dim]; `ends_chunk` [batch] bool. Returns score [batch], A, M."""
    k = at_least_float32(k)
    outer = k[..., :, None] * k[..., None, :]
    share, A = leverage(k, M), forgetting * A + outer
    return share / (1 + share), A, torch.where(ends_chunk[:, None, None], rls_prior(A, forgetting), M + outer)


@exact
def rls_naive(
    k: Tensor, valid: Tensor, A: Tensor, M: Tensor, *, chunk_size: int, forgetting: float, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, one token at a time. Arguments as in `rls_chunked`."""
    start_A, start_M = rls_start(k.shape[0], k.shape[-1], k)
    scores = []
    for t in range(k.shape[1]):
        if resets is not None and t % chunk_size == 0:
            fresh = resets[:, t // chunk_size, None, None]
            A, M = torch.where(fresh, start_A, A), torch.where(fresh, start_M, M)
        ends = torch.full_like(valid[:, t], t % chunk_size == chunk_size - 1)
        score, new_A, new_M = rls_step(k[:, t], A, M, ends, forgetting=forgetting)
        here = valid[:, t]
        scores.append(score * here)
        A, M = torch.where(here[:, None, None], new_A, A), torch.where(here[:, None, None], new_M, M)
    return torch.stack(scores, 1), A, M


@exact
def rls_chunked(
    k: Tensor, valid: Tensor, A: Tensor, M: Tensor, *, chunk_size: int, forgetting: float, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [batch, time] of k [batch, time, dim], zero where not `valid`; and A, M [batch, dim, dim] after it."""
    k = at_least_float32(k) * valid[..., None]
    batch, time, dim = k.shape
    K = k.view(batch, -1, chunk_size, dim)
    alive = valid.view(batch, -1, chunk_size)
    later = alive.flip(-1).cumsum(-1).flip(-1) - alive.long()  # tokens of the chunk that come after
    faded = K * (later.to(k.dtype) * math.log(forgetting)).exp()[..., None]
    within = faded.mT @ K  # [batch, chunks, dim, dim]
    plain = K.mT @ K
    shrink = (alive.sum(-1).to(k.dtype) * math.log(forgetting)).exp()
    start_A, start_M = rls_start(batch, dim, k)
    priors = []
    for c in range(K.shape[1]):
        if resets is not None:
            fresh = resets[:, c, None, None]
            A, M = torch.where(fresh, start_A, A), torch.where(fresh, start_M, M)
        priors.append(M)
        A = shrink[:, c, None, None] * A + within[:, c]
        M = torch.where(alive[:, c, -1, None, None], rls_prior(A, forgetting), M + plain[:, c])
    return ((1 - 1 / variances(K, torch.stack(priors, 1))).clamp(min=0) * alive).view(batch, time), A, M


rls_decode = dispatched(  # A and M are given up
    chunked=rls_step, naive=rls_step, fused={"cpu": "bmojo.ops.step_cpu:rls_decode"}
)
rls = dispatched(
    chunked=rls_chunked,
    naive=rls_naive,
    fused={"cpu": "bmojo.ops.innovation_cpu:rls", "cuda": "bmojo.ops.triton_rls:rls"},
)


@exact
def ema(
    x: Tensor, valid: Tensor, mean: Tensor | None, *, chunk_size: int, forgetting: float, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores [batch, time] of x [batch, time, dim], and the fading sum [batch, dim] after it."""
    x = at_least_float32(x)
    dt = valid.to(x.dtype)[..., None]
    ones = torch.ones_like(dt)[..., None]
    state = None if mean is None else mean[:, None, None]
    options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": True}
    past, state = ssd(x[:, :, None], dt, _log_rate(forgetting, x), ones, ones, **options)
    return cosine_distance(x, past.squeeze(2)) * valid, state[:, 0, 0]


@exact
def ema_step(x: Tensor, mean: Tensor, *, forgetting: float) -> tuple[Tensor, Tensor]:
    """One token x [batch, dim]; the score [batch] and the new fading sum."""
    one = torch.ones_like(mean[:, :1])
    B = one[..., None]
    _, state = ssd_step(x[:, None], one, _log_rate(forgetting, mean), B, B, state=mean[:, None, None])
    return cosine_distance(x, mean), state[:, 0, 0]


def _log_rate(forgetting: float, like: Tensor) -> Tensor:
    """A_log [1] of a scan that forgets so: log(-log g); -inf, no decay, for g = 1."""
    rate = -math.log(forgetting)
    return like.new_full((1,), math.log(rate) if rate > 0 else -math.inf)


def cosine_distance(x: Tensor, past: Tensor) -> Tensor:
    """1 - cos(x, past) over the last dimension, in [0, 2]; 1 where either is zero."""
    return (1 - torch.cosine_similarity(at_least_float32(x), past, dim=-1)).clamp(min=0)


@exact
def relative_error(value: Tensor, predicted: Tensor) -> Tensor:
    """|value - predicted|^2 / |value|^2 over the last dimension; 0 for a zero value."""
    value = at_least_float32(value)
    size = value.square().sum(-1)
    return ((value - predicted).square().sum(-1) / size.masked_fill(size == 0, 1)).masked_fill(size == 0, 0)


def position_score(kind: str, position: Tensor, seed: int) -> Tensor:
    """The baselines that look at positions alone: "recent" keeps the newest, "first" the oldest, "random" any."""
    position = position.clamp(min=0)
    if kind == "recent":
        return torch.ones_like(position, dtype=torch.float32)  # ties go to the newer
    if kind == "first":
        return 1 / (1 + position.to(torch.float32))
    mixed = (position + 1) * 2654435761 + (seed + 1) * 40503
    for multiplier, shift in (
        (2246822519, 15),
        (3266489917, 13),
    ):  # an integer hash: the same in any call, any chunking
        mixed = ((mixed ^ ((mixed & 0xFFFFFFFF) >> shift)) * multiplier) & 0xFFFFFFFF
    return (mixed & 0xFFFFFF).to(torch.float32) / 2**24
