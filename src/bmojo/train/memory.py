"""The most memory held while something runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Forget earlier peaks, and give back what earlier models left to the system, where it can be done."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of the GNU C library
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_bytes() -> int | None:
    """Bytes allocated on the accelerator, or else resident in this process; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _from_status("VmRSS")


def peak_memory_bytes() -> int:
    """Bytes allocated on the accelerator, or else resident in this process, at most since `reset_peak_memory`.

    Where Linux' /proc is missing the peak is that of the whole life of the process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (peak := _from_status("VmHWM")) is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _from_status(name: str) -> int | None:
    """A size that Linux tells of this process."""
    with contextlib.suppress(OSError):
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None
    return None
