"""What it was run on, for the record."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """`cpu`, `threads` of this process, `torch`, and `device`: the GPU's name, or "cpu"."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
