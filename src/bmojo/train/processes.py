"""The processes of a run: this one alone, or those that torchrun started, each with its share of every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bmojo.files import optional_module

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> PartialState:
    """Where this process stands among them: `num_processes`, `process_index`, `main_process_first()` and so on.

    The first call in each joins them (gloo on CPUs), so all must make it.
    """
    return optional_module("accelerate", "training").PartialState(cpu=not torch.cuda.is_available())
