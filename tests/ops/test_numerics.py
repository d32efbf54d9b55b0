"""What every op goes through: the choice of its form, and of the dtype that it computes in."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from bmojo.ops import native
from bmojo.ops.dispatch import dispatched, use_backend
from bmojo.ops.numerics import at_least_float32, exact, widest


def test_a_dispatched_op_passes_its_arguments_to_the_form_in_use():
    def chunked(x, *, scale):
        """What it does."""
        return "chunked", x, scale

    def naive(x, *, scale):
        return "naive", x, scale

    op = dispatched(chunked=chunked, naive=naive)
    assert op.__name__ == "chunked"
    assert op.__doc__ == "What it does."
    assert op(1, scale=2) == ("chunked", 1, 2)
    with use_backend("naive"):
        assert op(1, scale=2) == ("naive", 1, 2)
        with use_backend("chunked"):
            assert op(x=1, scale=2) == ("chunked", 1, 2)
        assert op(1, scale=2) == ("naive", 1, 2)
    with pytest.raises(KeyError), use_backend("naive"):
        raise KeyError
    assert op(1, scale=2) == ("chunked", 1, 2)


def test_a_kernel_runs_on_its_device_and_a_missing_one_is_announced_once(caplog):
    def chunked(x):
        return "chunked"

    kernel = "bmojo.ops.numerics:at_least_float32"
    here = dispatched(chunked=chunked, naive=chunked, fused={"cpu": kernel, "cuda": "bmojo.no_such_module:kernel"})
    x = torch.zeros(1, dtype=torch.float16)
    with caplog.at_level(logging.INFO, logger="bmojo.ops"):
        assert here(x).dtype == torch.float32
        assert here(x).dtype == torch.float32
    assert len(caplog.records) <= 1  # none, if another test asked for it
    with use_backend("chunked"):
        assert here(x) == "chunked"
    missing = dispatched(chunked=chunked, naive=chunked, fused={"cpu": "bmojo.no_such_module:kernel"})
    with pytest.warns(UserWarning, match="no fused kernel, the chunked form runs, which is slower: No module named"):
        assert missing(x) == "chunked"
    assert missing(x) == "chunked"


def test_an_exact_op_has_no_autocast():
    @exact
    def product(a, *, b):
        return a @ b

    a, b = torch.full((2, 2), 1 + 2**-12), torch.eye(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert torch.equal(product(a, b=b), a)
        assert torch.equal(product(a=a, b=b), a)
        assert (a @ b).dtype == torch.bfloat16
    assert product.__name__ == "product"


def test_types_are_widened_and_never_narrowed():
    half, single, double = (torch.ones(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert [at_least_float32(x).dtype for x in (half, single, double)] == [torch.float32, torch.float32, torch.float64]
    assert widest(single).dtype == torch.float64


@pytest.mark.parametrize("kind", ["mps", "xla"])
def test_a_device_without_float64_keeps_its_dtype(kind):
    class Elsewhere:
        device = torch.device(kind)

    x = Elsewhere()
    assert widest(x) is x


def test_a_kernel_that_failed_to_load_is_not_asked_for_again():
    """Where warnings are errors, too."""
    plain = dispatched(chunked=lambda x: x, naive=lambda x: x, fused={"cpu": "bmojo.no_such_module:other"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no fused other"):
            plain(torch.zeros(1))
        plain(torch.zeros(1))


def test_sources_that_do_not_compile_are_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_failed", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    with pytest.raises(ImportError, match="no-such-compiler") as first:
        native.load_ops("ssd_cpu.cpp")
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(ImportError) as second:
        native.load_ops("ssd_cpu.cpp")
    assert str(first.value) == str(second.value)
