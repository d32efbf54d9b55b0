"""Convolution, rotary positions, norm and SwiGLU in C++: as in PyTorch, forwards and backwards by name."""

from __future__ import annotations

import pytest
import torch
from cases import close

from bmojo.ops import layers, layers_cpu, rope


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def same(fused, plain, arguments: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    """Outputs and the gradients of what needs one."""
    results = []
    wanted = {name: z for name, z in arguments.items() if z.requires_grad}
    for form in (fused, plain):
        out = form(**arguments)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
        gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()))
        results.append({"out": out} | {f"d {n}": z for n, z in zip(wanted, gradients, strict=True)})
    for name, expected in results[1].items():
        close(results[0][name], expected, tolerance, name)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("channels", "size", "time"), [(1, 1, 1), (5, 4, 3), (32, 4, 70), (37, 2, 9), (40, 3, 17)])
def test_convolution(channels, size, time, documents, silu):
    arguments = {"extended": normal(2, size - 1 + time, channels), "weight": normal(channels, size, seed=1)}
    if silu:
        arguments["bias"] = normal(channels, seed=2)
    if documents:
        arguments["position"] = torch.arange(time).expand(2, -1) % 5
    same(lambda **z: layers_cpu.causal_conv(**z, silu=silu), lambda **z: layers._causal_conv(**z, silu=silu), arguments)


@pytest.mark.parametrize("shape", [(3, 7, 2, 6), (2, 5, 4, 32), (2, 3, 5, 2, 20)])
@pytest.mark.parametrize("rows", [1, None])
def test_rotation(shape, rows):
    inner = torch.Size(shape[1:-2])
    positions = torch.arange(inner.numel()).view(inner)
    positions = positions.expand(rows or shape[0], *shape[1:-2]) + torch.arange(rows or shape[0]).view(
        -1, *(1,) * (len(shape) - 3)
    )
    table = rope.rope_table(positions, shape[-1], 100.0, torch.float64)
    same(lambda x: layers_cpu.rotate(x, table), lambda x: rope._rotate(x, table), {"x": normal(*shape)})


@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 7), (4, 32), (2, 300, 48)])
def test_norm(shape):
    arguments = {"x": normal(*shape), "weight": normal(shape[-1], seed=1)}
    same(lambda x, weight: layers_cpu.rms_norm(x, weight, 1e-5), lambda x, weight: layers._rms_norm(x, weight, 1e-5),
         arguments)  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 2), (2, 5, 14), (4, 64), (2, 300, 96)])
def test_swiglu(shape):
    same(layers_cpu.swiglu, layers._swiglu, {"x": normal(*shape)})


def test_extreme_gates_stay_finite():
    x = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4, *(2.0 for _ in range(26))] * 2]).requires_grad_()
    y = layers_cpu.swiglu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    close(y, layers._swiglu(x), 1e-6)
    assert gradient.isfinite().all()
    assert layers_cpu.swiglu(torch.full((1, 32), torch.nan)).isnan().all()


def test_strides_do_not_matter():
    wide = normal(2, 9, 80)
    same(lambda x: layers_cpu.swiglu(x[..., 8:72]), lambda x: layers._swiglu(x[..., 8:72]), {"x": wide})
    same(lambda x: layers_cpu.rms_norm(x.mT, torch.ones(9, dtype=x.dtype), 1e-5),
         lambda x: layers._rms_norm(x.mT, torch.ones(9, dtype=x.dtype), 1e-5), {"x": wide})  # fmt: skip


def test_mixed_and_half_dtypes_take_the_forms_in_pytorch():
    x, weight = normal(3, 8, dtype=torch.bfloat16), normal(8, dtype=torch.float32, seed=1)
    assert torch.equal(layers_cpu.rms_norm(x, weight, 1e-5), layers._rms_norm(x, weight, 1e-5))
    assert layers_cpu.swiglu(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["conv_forward", "rotate", "norm_forward", "swiglu_forward"])
@pytest.mark.filterwarnings("ignore")
def test_registered_as_pytorch_wants_it(name):
    x, table = normal(2, 6, 8), [z.detach() for z in (normal(1, 6, 1, 4), normal(1, 6, 1, 4, seed=1))]
    arguments = {
        "conv_forward": (x, normal(8, 3, seed=1), normal(8, seed=2), None, True),
        "rotate": (normal(2, 6, 2, 4), *table, False),
        "norm_forward": (x, normal(8, seed=1), 1e-5),
        "swiglu_forward": (x,),
    }
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.bmojo, name).default, arguments[name], test_utils=tests)


def test_weights_may_have_any_strides():
    x, wide = normal(2, 12, 5), normal(4, 10, seed=1)
    same(lambda extended, weight: layers_cpu.causal_conv(extended, weight[:, ::2].mT),
         lambda extended, weight: layers._causal_conv(extended, weight[:, ::2].mT),
         {"extended": x, "weight": wide})  # fmt: skip
    one = torch.ones(1, dtype=torch.float64).expand(5)
    close(layers_cpu.rms_norm(x, one, 1e-5), layers._rms_norm(x, one, 1e-5), 1e-12)


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_gradients_are_refused():
    x = normal(2, 8)
    (gradient,) = torch.autograd.grad(layers_cpu.swiglu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use_backend"):
        torch.autograd.grad(gradient.sum(), x)


def test_gradients_of_weights_keep_their_digits_over_many_rows():
    """Sums of 65,536 terms in float32, whose mean is not zero."""
    x, dy = (normal(65536, 16, seed=seed).detach() + 1 for seed in (0, 1))
    weight, taps = normal(16, seed=2).detach(), normal(16, 4, seed=3).detach()
    results = []
    for dtype in (torch.float64, torch.float32):
        z, g, w, t = (each.to(dtype) for each in (x, dy, weight, taps))
        inverse = torch.ops.bmojo.norm_forward(z, w, 1e-5)[1]
        padded = torch.cat((z.new_zeros(3, 16), z))[None]
        conv = torch.ops.bmojo.conv_backward(g[None], padded, t, w, None, False)
        results.append((torch.ops.bmojo.norm_backward(g, z, w, inverse)[1], *conv[1:]))
    for exact, got in zip(*results, strict=True):
        close(got, exact, 1e-6)
