"""The scans: naive, chunked and one-token forms agree, forwards and backwards by name, at odd lengths."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import close

from bmojo.ops import gated_delta as delta
from bmojo.ops import s6, ssd

CHUNK = 16


def inputs(op: str, time: int, groups: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random arguments of a scan, with two padded steps inside and the last chunk padded full; and a state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, dtype=torch.float64, generator=generator)

    length = -(-time // CHUNK) * CHUNK
    alive = (torch.arange(length) < time) & (torch.arange(length) != 3)
    if op == "ssd":
        args = {"x": normal(length, 4, 5), "dt": F.softplus(normal(length, 4)) * alive[:, None],
                "A_log": normal(4)[0], "B": normal(length, groups, 3), "C": normal(length, groups, 3)}  # fmt: skip
    elif op == "s6":
        args = {"x": normal(length, 5), "dt": F.softplus(normal(length, 5)) * alive[:, None],
                "A_log": normal(5, 3)[0], "B": normal(length, 3), "C": normal(length, 3)}  # fmt: skip
    else:
        args = {"q": normal(length, 4, 3), "k": F.normalize(normal(length, 4, 3), dim=-1), "v": normal(length, 4, 5),
                "beta": normal(length, 4).sigmoid() * alive[:, None],
                "g": -F.softplus(normal(length, 4)) * alive[:, None]}  # fmt: skip
    args["state"] = normal(3, 5) if op == "s6" else normal(4, 3, 5)
    return {name: z.detach().requires_grad_() for name, z in args.items()}


FORMS = {
    "ssd": (ssd.ssd_naive, ssd.ssd_chunked, ssd.ssd_step),
    "gated_delta": (delta.gated_delta_naive, delta.gated_delta_chunked, delta.gated_delta_step),
    "s6": (s6.s6_naive, s6.s6_chunked, s6.s6_step),
}


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(("op", "groups"), [("ssd", 1), ("ssd", 2), ("ssd", 4), ("gated_delta", 4), ("s6", 1)])
@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 100])
def test_chunked_equals_naive_forwards_and_backwards(op, groups, time, exclusive):
    naive, chunked, _ = FORMS[op]
    results = []
    for form in (naive, chunked):
        args = inputs(op, time, groups)
        out, final = form(**args, chunk_size=CHUNK, exclusive=exclusive)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        ((out * weight)[:, :time].sum() + (final * weight.flatten()[0]).sum()).backward()
        results.append({"out": out[:, :time], "final": final} | {f"d{name}": z.grad for name, z in args.items()})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).square().mean().sqrt()
        assert error <= 1e-11 * expected.square().mean().sqrt().clamp(min=1e-3), f"{name}: {error}"


@pytest.mark.parametrize("op", FORMS)
def test_one_token_at_a_time(op):
    naive, _, step = FORMS[op]
    args = {name: z.detach() for name, z in inputs(op, 20, 2).items()}
    expected, final = naive(**args, chunk_size=CHUNK)
    state, fixed = args.pop("state"), {name: args.pop(name) for name in ("A_log",) if name in args}
    for t in range(expected.shape[1]):
        out, state = step(**{name: z[:, t] for name, z in args.items()}, **fixed, state=state)
        close(out, expected[:, t], 1e-12)
    close(state, final, 1e-12)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("op", FORMS)
def test_a_reset_starts_from_an_empty_state(op, exclusive):
    naive, chunked, _ = FORMS[op]
    args = {name: z.detach() for name, z in inputs(op, 4 * CHUNK, 4).items()}
    resets = torch.tensor([[False, True, False, True], [True, False, False, False]])
    options = {"chunk_size": CHUNK, "exclusive": exclusive}
    for form in (naive, chunked):
        out, final = form(**args, resets=resets, **options)
        for row in range(2):
            starts = [0, *(resets[row].nonzero()[:, 0] * CHUNK).tolist(), 4 * CHUNK]
            for a, b in itertools.pairwise(starts):
                part = {n: z if n == "A_log" else z[row : row + 1, a:b] for n, z in args.items() if n != "state"}
                if a == b:
                    continue
                state = args["state"][row : row + 1] if a == 0 and not resets[row, 0] else None
                expected, end = naive(**part, state=state, **options)
                close(out[row : row + 1, a:b], expected, 1e-11)
            close(final[row : row + 1], end, 1e-11)


@pytest.mark.parametrize("op", FORMS)
def test_padded_steps_leave_the_state_as_it_is(op):
    naive, chunked, step = FORMS[op]
    args = {name: z.detach() for name, z in inputs(op, CHUNK, 4).items()}
    for name in ("dt", "beta", "g"):
        if name in args:
            args[name] = torch.zeros_like(args[name])
    for form in (naive, chunked):
        close(form(**args, chunk_size=CHUNK)[1], args["state"], 1e-15)
    first = {name: z if name in ("A_log", "state") else z[:, 0] for name, z in args.items()}
    close(step(**first)[1], args["state"], 1e-15)


@pytest.mark.parametrize("op", FORMS)
def test_half_precision_inputs_are_scanned_in_float32_and_long_decays_stay_finite(op):
    _, chunked, _ = FORMS[op]
    args = {name: z.detach().to(torch.bfloat16) for name, z in inputs(op, 64, 4).items()}
    name = "g" if op == "gated_delta" else "dt"
    args[name] = args[name] * 1000
    out, final = chunked(**args, chunk_size=64)
    assert out.dtype == final.dtype == torch.float32
    assert out.isfinite().all()
    assert final.isfinite().all()
