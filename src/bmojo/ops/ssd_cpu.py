"""`bmojo.ops.ssd` on CPUs in C++: see `scan_cpu`."""

from __future__ import annotations

from torch import Tensor

from bmojo.ops.numerics import at_least_float32, exact
from bmojo.ops.scan_cpu import Scan
from bmojo.ops.ssd import ssd_chunked

_scan = Scan("ssd", lambda x, dt, rate, B, C: (x, (x[0], x[2], B[3], x[3])))


@exact
def ssd(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `bmojo.ops.ssd`; the chunked form runs for gradients of `exclusive` reads."""
    x, dt, A_log, B, C = map(at_least_float32, (x, dt, A_log, B, C))
    done = _scan((x, dt, A_log.exp(), B, C), state, resets, chunk_size, exclusive)
    options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
    return done or ssd_chunked(x, dt, A_log, B, C, **options)
