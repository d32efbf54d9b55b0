"""What the tests of `bmojo.hf` share."""

from __future__ import annotations

from typing import Any

import torch
from cases import shaken, small_preset
from torch import Tensor

from bmojo import BMojoConfig, BMojoForCausalLM, ModelConfig, presets

PRESETS = tuple(presets.PRESETS)


def hf_model(config: str | ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any):
    """A model with no trivial weight, in eval mode: of a small preset or of a configuration."""
    core = small_preset(config, **changes) if isinstance(config, str) else config.replace(**changes)
    return shaken(BMojoForCausalLM(BMojoConfig.from_core(core)), seed, dtype).eval()


def left_padded(rows: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [1, time] of several lengths as one batch, and its mask."""
    time = max(row.shape[1] for row in rows)
    fill = torch.nn.functional.pad
    tokens = torch.cat([fill(row, (time - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([fill(torch.ones_like(row), (time - row.shape[1], 0)) for row in rows])
    return tokens, mask


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Bit for bit, dtypes included."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
