"""`bmojo.ops.gated_delta` on CPUs in C++: see `scan_cpu`."""

from __future__ import annotations

from torch import Tensor

from bmojo.ops.gated_delta import gated_delta_chunked
from bmojo.ops.numerics import at_least_float32, exact
from bmojo.ops.scan_cpu import Scan

_scan = Scan("gated_delta", lambda q, k, v, beta, g: (v, (*v[:1], v[2], k[3], v[3])))


@exact
def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *,
    chunk_size: int, state: Tensor | None = None, resets: Tensor | None = None, exclusive: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `bmojo.ops.gated_delta`; the chunked form runs for gradients of `exclusive` reads."""
    inputs = tuple(map(at_least_float32, (q, k, v, beta, g)))
    done = _scan(inputs, state, resets, chunk_size, exclusive)
    options = {"chunk_size": chunk_size, "state": state, "resets": resets, "exclusive": exclusive}
    return done or gated_delta_chunked(*inputs, **options)
