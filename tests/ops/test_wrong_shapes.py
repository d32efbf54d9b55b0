"""What does not fit raises: the ops in C++ read memory by its address."""

from __future__ import annotations

import importlib

import pytest
import torch

MODULES = (
    "ops.ssd_cpu", "ops.gated_delta_cpu", "ops.s6_cpu", "ops.layers_cpu", "ops.step_cpu", "ops.innovation_cpu",
    "memory.eidetic_cpu", "memory.read_cpu",
)  # fmt: skip
for name in MODULES:
    importlib.import_module(f"bmojo.{name}")
ops = torch.ops.bmojo


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def whole(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int64)


def seen(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.bool)


def spans(keys: int) -> tuple[list[torch.Tensor], ...]:
    return [zeros(2, keys, 1, 4)], [zeros(2, keys, 1, 3)], [whole(2, keys)], [whole(2, keys)]


SCAN = (zeros(2, 8, 2, 3), zeros(2, 8, 2), zeros(2), zeros(2, 8, 1, 4), zeros(2, 8, 1, 4))
DELTA = (zeros(2, 8, 2, 4), zeros(2, 8, 2, 4), zeros(2, 8, 2, 3), zeros(2, 8, 2), zeros(2, 8, 2))
S6 = (zeros(2, 8, 3), zeros(2, 8, 3), zeros(4, 3), zeros(2, 8, 4), zeros(2, 8, 4))
SSD_STEP = (zeros(2, 2, 4, 3), zeros(2, 2, 3), zeros(2, 2), zeros(2), zeros(2, 1, 4), zeros(2, 1, 4))
DELTA_STEP = (zeros(2, 2, 4, 3), zeros(2, 2, 4), zeros(2, 2, 4), zeros(2, 2, 3), zeros(2, 2), zeros(2, 2))
CONV = (zeros(2, 10, 5), zeros(5, 3), zeros(5), whole(2, 8))
ATTEND = (zeros(3, 2, 4), zeros(3, 6, 1, 4), zeros(3, 6, 1, 4), seen(3, 6))
SELECT = (zeros(2, 10), whole(2, 10), seen(2, 2), seen(2, 2))
RLS = (zeros(2, 8, 3), seen(2, 8), zeros(2, 3, 3), zeros(2, 3, 3), seen(2, 2))
RLS_STEP = (zeros(2, 3, 3), zeros(2, 3, 3), zeros(2, 3), seen(2))

# arguments that fit, and how the op is called with them
CALLS = {
    "ssd": (SCAN, lambda *z: ops.ssd_forward(*z, zeros(2, 2, 4, 3), None, 4, False, True)),
    "ssd state": ((zeros(2, 2, 4, 3),), lambda z: ops.ssd_forward(*SCAN, z, None, 4, False, False)),
    "ssd resets": ((seen(2, 2),), lambda z: ops.ssd_forward(*SCAN, None, z, 4, False, False)),
    "ssd backward": (
        (zeros(2, 8, 2, 3), zeros(2, 2, 4, 3), zeros(2, 1, 2, 4, 3)),
        lambda dy, dlast, starts: ops.ssd_backward(dy, dlast, *SCAN, starts, None, 4),
    ),
    "gated_delta": (DELTA, lambda *z: ops.gated_delta_forward(*z, zeros(2, 2, 4, 3), None, 4, False, True)),
    "s6": (S6, lambda *z: ops.s6_forward(*z, None, None, 4, False, True)),
    "s6 resets": ((seen(2, 2),), lambda z: ops.s6_forward(*S6, None, z, 4, False, True)),
    "conv": (CONV, lambda *z: ops.conv_forward(*z, True)),
    "conv backward": ((zeros(2, 8, 5),), lambda z: ops.conv_backward(z, *CONV, True)),
    "norm": ((zeros(2, 3, 5), zeros(5)), lambda *z: ops.norm_forward(*z, 1e-5)),
    "norm backward": ((zeros(6, 5), zeros(6, 5), zeros(5), zeros(6)), ops.norm_backward),
    "rotate": ((zeros(2, 7, 3, 4), zeros(1, 7, 1, 4), zeros(1, 7, 1, 4)), lambda *z: ops.rotate(*z, False)),
    "swiglu backward": ((zeros(2, 3), zeros(2, 6)), ops.swiglu_backward),
    "ssd step": (SSD_STEP, ops.ssd_step),
    "gated_delta step": (DELTA_STEP, ops.gated_delta_step),
    "conv step": ((zeros(2, 2, 5), zeros(2, 5), zeros(5, 3), zeros(5)), lambda *z: ops.conv_step(*z, True)),
    "put": ((zeros(2, 4, 3), whole(2), zeros(2, 3)), ops.put),
    "attend step": (ATTEND, lambda q, k, v, mask: ops.attend_step(q, [k], [v], [mask])),
    "rls step": (RLS_STEP, lambda *z: ops.rls_step(*z, 0.9, 1.0, 1e4)),
    "rls": (RLS, lambda *z: ops.rls(*z, 4, 0.9, 1.0, 1e4)),
    "select": (SELECT, lambda *z: ops.select(*z, 2, 4, 0.1)),
    "read": (
        (zeros(2, 8, 2, 4), *(z for part in spans(6) for z in part)),
        lambda q, *z: ops.read_forward(q, *([part] for part in z), [3, 0, 0, 0], 4, True),
    ),
}
# what would fit another call: rows are any, values have a width of their own
FITS = {
    ("norm", 0): ("batch", "dimensions"),
    ("rotate", 0): ("batch",),
    ("attend step", 2): ("fewer", "more"),
    ("select", 0): ("dtype",),
    ("read", 2): ("fewer", "more"),
}


def wrong(z: torch.Tensor) -> dict[str, torch.Tensor]:
    """As z, but for one thing."""
    other = torch.float64 if z.is_floating_point() else torch.float32
    flat = z.flatten()
    return {
        "strides": torch.stack((flat, flat), -1)[:, 0].view_as(z) if z.numel() > 1 else z.to(other),
        "fewer": z[..., :-1].contiguous(),
        "more": torch.cat((z, z), -1),
        "batch": z[:1] if z.shape[0] > 1 else torch.cat((z, z, z)),
        "dimensions": z[None],
        "dtype": z.to(other),
    }


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_does_not_fit_is_refused(name):
    arguments, call = CALLS[name]
    call(*(z.clone() for z in arguments))
    for i, z in enumerate(arguments):
        for what, other in wrong(z).items():
            if what in FITS.get((name, i), ()):
                continue
            print(f"argument {i}: {what}")
            with pytest.raises((RuntimeError, IndexError)):
                call(*arguments[:i], other, *arguments[i + 1 :])


@pytest.mark.parametrize("at", [-1, 4, 2**40])
def test_put_stays_within_its_rows(at):
    rows = zeros(2, 4, 3)
    with pytest.raises(IndexError, match=rf"an index in \[0, 4\), got {at}"):
        ops.put(rows, torch.tensor([0, at]), torch.ones(2, 3))
    assert not rows.any()


def test_no_rows():
    ops.put(zeros(0, 4, 3), whole(0), zeros(0, 3))
    assert ops.rotate(zeros(0, 7, 3, 4), zeros(1, 7, 1, 4), zeros(1, 7, 1, 4), False).shape == (0, 7, 3, 4)
    assert ops.norm_forward(zeros(3, 0), zeros(0), 1e-5)[0].shape == (3, 0)
    assert ops.swiglu_forward(zeros(0, 4)).shape == (0, 2)
    assert ops.attend_step(zeros(0, 2, 4), [zeros(0, 6, 1, 4)], [zeros(0, 6, 1, 4)], [seen(0, 6)]).shape == (0, 2, 4)
    assert ops.ssd_step(*(z[:0] if z.ndim > 1 else z for z in SSD_STEP)).shape == (0, 2, 3)


def test_sizes_that_do_not_divide_are_refused():
    x, dt, rate, B, C = SCAN
    with pytest.raises(RuntimeError, match="ssd: expected a multiple of 3 heads, got 2"):
        ops.ssd_forward(x, dt, rate, *(z.expand(2, 8, 3, 4).contiguous() for z in (B, C)), None, None, 4, False, True)
    with pytest.raises(RuntimeError, match="ssd: expected a multiple of 5 tokens, got 8"):
        ops.ssd_forward(*SCAN, None, seen(2, 1), 5, False, True)
    with pytest.raises(RuntimeError, match="attend_step: expected a multiple of 0 heads, got 2"):
        ops.attend_step(zeros(3, 2, 4), [zeros(3, 6, 0, 4)], [zeros(3, 6, 0, 4)], [seen(3, 6)])
    with pytest.raises(RuntimeError, match="swiglu: expected a multiple of 2 channels, got 5"):
        ops.swiglu_forward(zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"rotate: expected .* of \[1, 7, 1, 4\], .* got \[2, 7, 1, 4\]"):
        ops.rotate(zeros(1, 7, 3, 4), zeros(2, 7, 1, 4), zeros(2, 7, 1, 4), False)
    with pytest.raises(RuntimeError, match=r"read: 6 keys do not fit the geometry \[4, 0, 0, 0\]"):
        ops.read_forward(zeros(2, 8, 2, 4), *spans(6), [4, 0, 0, 0], 4, False)
