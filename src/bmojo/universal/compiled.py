"""Plain loops as machine code, where numba is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

Loop = TypeVar("Loop", bound=Callable)

HAS_NUMBA = importlib.util.find_spec("numba") is not None


@cache
def compiled(loop: Loop) -> Loop:
    """numba's form of a function of numbers and arrays, kept on disk; the function itself without numba.

    No fast-math: sums, products and quotients are those of Python to the last bit.
    """
    if not HAS_NUMBA:
        return loop
    numba: Any = importlib.import_module("numba")
    return numba.njit(cache=True, nogil=True)(loop)
