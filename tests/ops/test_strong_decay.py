"""Strong decays beside weak ones in a chunk cost no digits: the chunked forms in float32 are as good as one by one."""

import pytest
import torch

from bmojo.ops.gated_delta import gated_delta_chunked, gated_delta_naive
from bmojo.ops.s6 import s6, s6_chunked, s6_naive
from bmojo.ops.ssd import ssd_chunked, ssd_naive


def worst(got, expected):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("chunk", [64, 256])
def test_ssd(chunk):
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 256, *size) for size in ((2, 8), (1, 4), (1, 4)))
    dt = torch.tensor([20.0, 0.01]).repeat(128)[None, :, None].expand(1, 256, 2)
    args = (x, dt, torch.tensor(16.0).log().expand(2), B, C)
    exact = ssd_naive(*(z.double() for z in args), chunk_size=chunk)
    assert worst(ssd_chunked(*args, chunk_size=chunk), exact) < 1e-5


@pytest.mark.parametrize("chunk", [64, 256])
def test_gated_delta(chunk):
    torch.manual_seed(0)
    q, k = torch.nn.functional.normalize(torch.randn(2, 1, 256, 2, 4), dim=-1)
    v, beta = torch.randn(1, 256, 2, 8), torch.rand(1, 256, 2)
    g = torch.tensor([-200.0, -0.001]).repeat(128)[None, :, None].expand(1, 256, 2)
    args = (q, k, v, beta, g)
    exact = gated_delta_naive(*(z.double() for z in args), chunk_size=chunk)
    assert worst(gated_delta_chunked(*args, chunk_size=chunk), exact) < 1e-5


@pytest.mark.parametrize("form", [s6_chunked, s6])
@pytest.mark.parametrize("chunk", [64, 256])
def test_s6(chunk, form):
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 256, size) for size in (8, 4, 4))
    dt = torch.tensor([20.0, 0.01]).repeat(128)[None, :, None].expand(1, 256, 8)
    args = (x, dt, torch.tensor([0.1, 1.0, 4.0, 16.0]).log().expand(8, 4), B, C)
    exact = s6_naive(*(z.double() for z in args), chunk_size=chunk)
    assert worst(form(*args, chunk_size=chunk), exact) < 1e-5
