"""The Triton kernels of `rls`, run by Triton's interpreter: in a process of their own, as it replaces the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import torch
import torch.nn.functional as F

from bmojo.ops import innovation

CASES = {
    "fresh": (8, 16, 3),  # dimensions, chunk, chunks
    "padded": (3, 4, 5),
    "documents": (20, 16, 3),
    "continued, ill conditioned": (32, 32, 2),
}


def check(case: str) -> None:
    """Against the definition in float64: within 1e-5 of the largest entry, or as near as the chunked form."""
    from bmojo.ops import triton_rls

    dim, chunk, chunks = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def unit(time: int) -> torch.Tensor:
        return F.normalize(torch.randn(2, time, dim, dtype=torch.float64, generator=generator), dim=-1)

    k, valid = unit(chunk * chunks), torch.ones(2, chunk * chunks, dtype=torch.bool)
    A, M = innovation.rls_start(2, dim, k)
    resets = None
    if case != "fresh":
        valid[:, -chunk // 2 :] = valid[0, 2] = False
    if case == "documents":
        resets = torch.tensor([[False, True, True], [True, False, True]])
    if case.startswith("continued"):
        few = unit(3)
        A = 1e6 * few.mT @ few
        M = innovation.rls_prior(A, 0.99)
        assert torch.linalg.cond(M).min() > 1e4
    options = {"chunk_size": chunk, "forgetting": 0.99, "resets": resets}
    expected = innovation.rls_naive(k, valid, A, M, **options)
    single = [z.float() for z in (k, A, M)]
    got = triton_rls.rls(single[0], valid, *single[1:], **options)
    chunked = innovation.rls_chunked(single[0], valid, *single[1:], **options)
    for a, b, c in zip(got, chunked, expected, strict=True):
        assert a.dtype == torch.float32
        error, other = ((z - c).abs().max() / c.abs().max() for z in (a, b))
        assert error <= max(1e-5, 1.1 * float(other)), (case, error, other)
    assert (got[0][~valid] == 0).all()
    one, all_of_it = triton_rls.leverage(single[0][:, 0], single[2]), innovation.leverage_cholesky(k[:, 0], M)
    assert (one / (1 + one) - all_of_it / (1 + all_of_it)).abs().max() <= 1e-5
    double = triton_rls.rls(k, valid, A, M, **options)
    assert torch.equal(double[0], innovation.rls_chunked(k, valid, A, M, **options)[0])


def test_the_kernels_give_the_definition():
    run = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_they_compile_for_a_gpu():
    """To machine code for compute capability 9.0, which takes no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from triton import compile as build
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from bmojo.ops import triton_rls

        kinds = {"fresh": "*i32", "complete": "*i32", "chunks": "i32", "chunk": "i32", "dim": "i32",
                 "forgetting": "fp32", "ridge": "fp32", "condition": "fp32", "SIZE": "constexpr"}  # fmt: skip
        for kernel in (triton_rls._starts, triton_rls._leverages):
            signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constexprs={"SIZE": 32})
            assert build(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


if __name__ == "__main__":
    for case in CASES:
        check(case)
