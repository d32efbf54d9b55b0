"""`bmojo.ops.s6` on CPUs in C++, float32: see `scan_cpu`. Vectors and threads go over tiles of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.ops.numerics import at_least_float32, exact
from bmojo.ops.s6 import s6_chunked
from bmojo.ops.scan_cpu import Scan

_scan = Scan("s6", lambda x, dt, A, B, C: (x, (x[0], B[2], x[2])), span=32)


@exact
def s6(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `bmojo.ops.s6`; the chunked form runs for float64, and for gradients of `exclusive` reads."""
    x, dt, A_log, B, C = map(at_least_float32, (x, dt, A_log, B, C))
    wide = any(z is not None and z.dtype == torch.float64 for z in (x, dt, A_log, B, C, state))
    done = None if wide else _scan((x, dt, -A_log.exp().T, B, C), state, resets, chunk_size, exclusive)
    options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
    return done or s6_chunked(x, dt, A_log, B, C, **options)
