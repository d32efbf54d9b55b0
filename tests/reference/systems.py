"""Random stable systems for tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from bmojo.realize import LTI


def stable(seed: int, n: int, p: int, m: int, *, radius: float = 0.95, pairs: int = 0, positive: bool = False) -> LTI:
    """n states, `pairs` of whose poles are complex, condition number 4 at most; m noises, p outputs."""
    rng = np.random.default_rng(seed)
    A = np.zeros((n, n))
    for i in range(pairs):
        a, r = rng.uniform(0.2, np.pi - 0.2), radius * np.sqrt(rng.uniform(0.05, 1))
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = r * np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    rest = range(2 * pairs, n)
    spaced = (np.arange(len(rest)) + rng.uniform(0.2, 0.8, len(rest))) / max(len(rest), 1)  # none coincide
    A[rest, rest] = radius * (spaced if positive else 2 * spaced - 1)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    T = left @ np.diag(rng.uniform(0.5, 2, n)) @ right
    B, C, D = rng.standard_normal((n, m)), rng.standard_normal((p, n)), rng.standard_normal((p, m))
    return LTI(T @ A @ np.linalg.inv(T), T @ B, C @ np.linalg.inv(T), D)


@st.composite
def systems(draw: st.DrawFn, *, positive: bool = False, square: bool = False) -> LTI:
    """Up to 6 states and 3 outputs; `square`: as few noises as outputs, too, where 6 states are hardly minimal."""
    n, p = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    pairs = 0 if positive else draw(st.integers(0, n // 2))
    m = draw(st.integers(p if square else p + 1, n + p))
    radius = draw(st.sampled_from([0.5, 0.9, 0.99]))
    return stable(draw(st.integers(0, 10**6)), n, p, m, radius=radius, pairs=pairs, positive=positive)
