"""Plain loops as machine code, where numba is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from bmojo.files import optional_module

Loop = TypeVar("Loop", bound=Callable)

HAS_NUMBA = importlib.util.find_spec("numba") is not None


@cache
def compiled(loop: Loop) -> Loop:
    """numba's form of a function of numbers and arrays, kept on disk if it can be; the function itself without numba.

    No fast-math: sums, products and quotients are those of Python to the last bit.
    """
    if not HAS_NUMBA:
        return loop
    numba = optional_module("numba", "this", "universal")
    try:
        return numba.njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # neither this package's folder nor the user's cache can be written: compiled in each process
        return numba.njit(nogil=True)(loop)


def uses_numba(what: str) -> bool:
    """Whether there is numba; a warning if not."""
    if not HAS_NUMBA:
        warnings.warn(f"{what} is 100 times slower without numba: pip install 'bmojo[universal]'", stacklevel=4)
    return HAS_NUMBA
