"""The scans of Mamba-2 and of the gated delta rule in C++: the definition, forwards and backwards by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bmojo.ops import gated_delta, gated_delta_cpu, ssd, ssd_cpu

CHUNK = 16
FORMS = {
    "ssd": (ssd_cpu.ssd, ssd.ssd_naive, ssd.ssd_chunked),
    "gated_delta": (gated_delta_cpu.gated_delta, gated_delta.gated_delta_naive, gated_delta.gated_delta_chunked),
}
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6}


def inputs(op: str, time: int, heads: int, groups: int, width: int, size: int) -> dict[str, torch.Tensor]:
    """Random arguments in float64, with padded steps inside and at the end of the first row."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, dtype=torch.float64, generator=draw)

    alive = torch.ones(2, time, 1, dtype=torch.float64)
    alive[:, 3] = alive[0, time - 5 :] = 0
    if op == "ssd":
        args = {"x": normal(time, heads, width), "dt": F.softplus(normal(time, heads) - 1) * alive,
                "A_log": normal(heads)[0], "B": normal(time, groups, size),
                "C": normal(time, groups, size)}  # fmt: skip
    else:
        args = {"q": normal(time, heads, size), "k": F.normalize(normal(time, heads, size), dim=-1),
                "v": normal(time, heads, width), "beta": normal(time, heads).sigmoid() * alive,
                "g": -F.softplus(normal(time, heads)) * alive}  # fmt: skip
    return args | {"state": normal(heads, size, width)}


def run(form, args, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    args = {name: z.detach().to(dtype).requires_grad_() for name, z in args.items()}
    y, final = form(**args, chunk_size=CHUNK, **options)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, dtype=torch.float64, generator=draw).to(dtype) for z in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return {"y": y.detach(), "final": final.detach()} | {f"d{name}": z.grad for name, z in args.items()}


def near(got, expected, bound: float) -> None:
    for name, value in expected.items():
        error = (got[name].double() - value).square().mean().sqrt() / value.square().mean().sqrt().clamp(min=1e-30)
        assert error < bound, f"{name}: {error:.1e}"


# tiles of 16 or 32 channels, spans of 64 steps, whole and not
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 32, 3), (4, 2, 33, 5), (6, 3, 70, 2)])
@pytest.mark.parametrize("time", [16, 64, 80, 144])
@pytest.mark.parametrize("op", FORMS)
def test_it_is_the_definition(op, time, sizes, dtype):
    kernel, naive, _ = FORMS[op]
    args = inputs(op, time, *sizes)
    near(run(kernel, args, dtype), run(naive, args, torch.float64), BOUNDS[dtype])


@pytest.mark.parametrize("op", FORMS)
def test_documents_start_anew(op):
    kernel, naive, _ = FORMS[op]
    args = inputs(op, 112, 4, 2, 9, 3)
    resets = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1]]).bool()
    got, expected = (run(form, args, torch.float64, resets=resets) for form in (kernel, naive))
    assert (got["dstate"][1] == 0).all()
    near(got, expected, 1e-13)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", FORMS)
def test_a_read_before_the_write(op, grad):
    kernel, naive, _ = FORMS[op]
    args = {name: z.requires_grad_(grad) for name, z in inputs(op, 112, 4, 2, 9, 3).items()}
    got, expected = (form(**args, chunk_size=CHUNK, exclusive=True) for form in (kernel, naive))
    assert got[0].requires_grad == grad
    near(dict(enumerate(got)), dict(enumerate(expected)), 1e-12)


@pytest.mark.parametrize("op", FORMS)
def test_strong_decay_leaves_the_gradients_exact(op):
    kernel, naive, _ = FORMS[op]
    args = inputs(op, 80, 4, 1, 9, 3)
    name = "dt" if op == "ssd" else "g"
    args[name] = args[name] * 300
    near(run(kernel, args, torch.float32), run(naive, args, torch.float64), 1e-6)


def test_the_rates_gradient_keeps_its_digits_over_many_steps():
    """A sum over 16,384 steps in float32, whose mean is not zero."""
    args = inputs("ssd", 16384, 2, 1, 4, 2)
    args = {name: z + 1 if name in ("x", "B", "C") else z for name, z in args.items()} | {"A_log": torch.zeros(2)}
    gradients = []
    for dtype in (torch.float64, torch.float32):
        z = {name: each.to(dtype) for name, each in args.items()}
        rate = z["A_log"].requires_grad_()
        ssd_cpu.ssd(**z, chunk_size=CHUNK)[0].sum().backward()
        gradients.append(rate.grad.double())
    assert (gradients[1] / gradients[0] - 1).abs().max() < 5e-7


@pytest.mark.parametrize("op", FORMS)
def test_neither_strides_nor_threads_matter(op):
    kernel, naive, _ = FORMS[op]
    args = {name: z.flip(-1).flip(-1) if z.ndim < 3 else z.mT.contiguous().mT
            for name, z in inputs(op, 80, 4, 2, 33, 3).items()}  # fmt: skip
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, args, torch.float64))
    finally:
        torch.set_num_threads(before)
    near(results[0], run(naive, args, torch.float64), 1e-13)
    near(results[1], results[0], 1e-13)


@pytest.mark.parametrize("op", FORMS)
def test_half_precision_is_scanned_in_float32(op):
    kernel, _, chunked = FORMS[op]
    args = {name: z.to(torch.bfloat16) for name, z in inputs(op, 32, 4, 1, 8, 3).items()}
    got, expected = (form(**args, chunk_size=CHUNK) for form in (kernel, chunked))
    assert got[0].dtype == got[1].dtype == torch.float32
    near(dict(enumerate(got)), dict(enumerate(expected)), 1e-6)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_compilers(op):
    kernel, _, _ = FORMS[op]
    args = inputs(op, 32, 4, 2, 9, 3)
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    near(run(compiled, args, torch.float64), run(kernel, args, torch.float64), 1e-14)
    torch.compiler.reset()


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_gradients_are_refused(op):
    args = {name: z.requires_grad_() for name, z in inputs(op, 32, 4, 2, 9, 3).items()}
    y, _ = FORMS[op][0](**args, chunk_size=CHUNK)
    first = next(iter(args.values()))
    (gradient,) = torch.autograd.grad(y.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="use_backend"):
        torch.autograd.grad(gradient.sum(), first)
