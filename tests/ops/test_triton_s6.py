"""The Triton kernels of `s6`, run by Triton's interpreter: in a process of their own, as it replaces the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from bmojo.ops import s6

CASES = {"fresh": (3, 3), "one state": (2, 1), "documents": (5, 4), "continued": (2, 5)}  # channels, states
CHUNK, TIME = 32, 64


def check(case: str) -> None:
    """Values and gradients against the definition in float64, and half precision against its own rounded inputs."""
    from bmojo.ops import triton_s6

    triton_s6.FORWARD, triton_s6.BACKWARD = 16, 8  # several programs a row
    channels, states = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, dtype=torch.float64, generator=generator)

    alive = (torch.arange(TIME) < TIME - 5)[:, None]
    args = {"x": normal(TIME, channels), "dt": F.softplus(normal(TIME, channels)) * alive,
            "A_log": normal(channels, states)[0], "B": normal(TIME, states), "C": normal(TIME, states)}  # fmt: skip
    if case != "fresh":
        args["state"] = normal(states, channels)
    resets = torch.tensor([[False, True], [True, False]]) if case == "documents" else None
    for half in (False, True) if case == "documents" else (False,):
        if half:
            args = {n: z.bfloat16().double() if n in ("x", "B", "C") else z for n, z in args.items()}
        results = []
        for form, dtype in ((s6.s6_naive, torch.float64), (triton_s6.s6, torch.float32)):
            narrow = torch.bfloat16 if half and dtype == torch.float32 else dtype
            kinds = {n: narrow if n in ("x", "B", "C") else dtype for n in args}
            given = {n: z.to(kinds[n], copy=True).requires_grad_() for n, z in args.items()}
            y, final = form(**given, chunk_size=CHUNK, resets=resets)
            weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            ((y * weight.to(dtype)).sum() + final.sum()).backward()
            results.append({"y": y, "final": final} | {f"d{n}": z.grad for n, z in given.items()})
        for name, expected in results[0].items():
            got = results[1][name]
            assert got.dtype == (torch.bfloat16 if half and name in ("dx", "dB", "dC") else torch.float32)
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error <= (1e-2 if got.dtype == torch.bfloat16 else 2e-6), (case, name, error)
    args = {n: z.detach() for n, z in args.items()}
    for given, options in (
        (args, {"chunk_size": CHUNK}),
        ({n: z.float() for n, z in args.items()}, {"chunk_size": 8}),
        ({n: z.float() for n, z in args.items()}, {"chunk_size": CHUNK, "exclusive": True}),
    ):  # what they are not made for
        assert torch.equal(triton_s6.s6(**given, **options)[0], s6.s6_chunked(**given, **options)[0])


@pytest.mark.slow
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

        from bmojo.ops import triton_s6

        sizes = {"SPAN": triton_s6.SPAN, "N": 16, "D": 8}
        whole = {"time", "channels", "states", "chunk_size"}
        for kernel in (triton_s6._forward, triton_s6._backward):
            signature = {n: "i32" if n in whole else "constexpr" if n in sizes else "*fp32" for n in kernel.arg_names}
            source = ASTSource(kernel, signature, constexprs=sizes)
            assert build(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


if __name__ == "__main__":
    for case in CASES:
        check(case)
