"""Our scans in terms of flash-linear-attention's: the mapping, with that package's PyTorch references as kernels."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from test_scans import CHUNK, FORMS, inputs

NAMES = {
    "ssd": ("fla.ops.simple_gla", "chunk_simple_gla", "naive_recurrent_simple_gla"),
    "gated_delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "naive_recurrent_gated_delta_rule"),
}


@pytest.fixture(scope="module")
def mapped():
    """`bmojo.ops.fla` on top of the references; they are read from their files, as to import the package takes long."""
    root = Path(importlib.util.find_spec("fla").origin).parents[1]
    stubs = {}
    for module, kernel, reference in NAMES.values():
        spec = importlib.util.spec_from_file_location("reference", root / module.replace(".", "/") / "naive.py")
        source = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(source)
        stubs[module] = types.SimpleNamespace(**{kernel: getattr(source, reference)})
    with pytest.MonkeyPatch.context() as patch:
        for module, stub in stubs.items():
            patch.setitem(sys.modules, module, stub)
        patch.delitem(sys.modules, "bmojo.ops.fla", raising=False)
        fla = importlib.import_module("bmojo.ops.fla")
        patch.delitem(sys.modules, "bmojo.ops.fla")
        patch.setattr(fla, "HALF", (torch.float32,))  # what the references compute in
        patch.setattr(fla, "LEAST", 1)
        yield fla


@pytest.mark.parametrize("continued", [True, False])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("op", "groups"), [("ssd", 1), ("ssd", 2), ("gated_delta", 4)])
def test_the_kernels_would_give_the_definition(mapped, op, groups, reset, exclusive, continued):
    resets = torch.tensor([[False, True, False], [True, False, True]]) if reset else None
    results = []
    for form in (FORMS[op][0], getattr(mapped, op)):
        args = {n: z.detach().float().requires_grad_() for n, z in inputs(op, 3 * CHUNK - 2, groups).items()}
        if not continued:
            del args["state"]
        out, final = form(**args, chunk_size=CHUNK, resets=resets, exclusive=exclusive)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        ((out * weight).sum() + (final * weight[0, 0, 0, 0]).sum()).backward()
        results.append({"out": out, "final": final} | {f"d{name}": z.grad for name, z in args.items()})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).square().mean().sqrt()
        assert error <= 2e-6 * expected.square().mean().sqrt().clamp(min=1e-3), f"{name}: {error}"


@pytest.mark.parametrize("op", NAMES)
def test_dtypes(mapped, op, monkeypatch):
    """Half precision in, float32 out; wider inputs go to the chunked form."""
    kernel, seen = NAMES[op][1], []

    def spy(**rows):
        seen.append({name: z.dtype for name, z in rows.items() if isinstance(z, torch.Tensor)})
        return reference(**rows)

    reference = getattr(mapped, kernel)
    monkeypatch.setattr(mapped, kernel, spy)
    monkeypatch.setattr(mapped, "HALF", (torch.bfloat16,))
    args = {n: z.detach().to(torch.bfloat16) for n, z in inputs(op, CHUNK, 4).items()}
    out, final = getattr(mapped, op)(**args, chunk_size=CHUNK)
    assert out.dtype == final.dtype == torch.float32
    (dtypes,) = seen
    assert {name for name, kind in dtypes.items() if kind == torch.float32} == set(dtypes) - {"q", "k", "v"}
    assert {dtypes[name] for name in "qkv"} == {torch.bfloat16}
    for wide in (torch.float32, torch.float64):
        args = {n: z.detach().to(wide) for n, z in inputs(op, CHUNK, 4).items()}
        out, _ = getattr(mapped, op)(**args, chunk_size=CHUNK)
        assert out.dtype == wide
        assert len(seen) == 1


def test_sizes_that_the_kernels_are_made_for(mapped, monkeypatch):
    monkeypatch.setattr(mapped, "LEAST", 16)
    x = torch.zeros(1, 1, 1, 16)
    assert mapped._fits(x, torch.zeros(1, 1, 1, 256))
    for v, k in ((x, 15), (x, 257), (x[..., :8], 16), (x.half(), 16)):
        assert not mapped._fits(v, torch.zeros(1, 1, 1, k))


@pytest.mark.slow
def test_the_installed_package_has_the_arguments_that_we_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kernel, _ in NAMES.values():
            has = inspect.signature(inspect.unwrap(getattr(importlib.import_module(name), kernel))).parameters
            needs = {"q", "k", "v", "g", "scale", "initial_state", "output_final_state"}
            assert needs | ({"beta"} if "delta" in name else set()) <= set(has)
