"""The linear system that a layer is next to a state and an input: `Mixer.linearize`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bmojo.errors import StateError
from bmojo.memory.step import Step
from bmojo.ops.dispatch import use_backend

if TYPE_CHECKING:
    from bmojo.nn.mixer import Mixer
    from bmojo.nn.ssm import State

MOST_NUMBERS = 8192  # of a state: its square is held, half a gigabyte
RINGS = ("k", "v", "fading_k", "fading_v")
MEMORY = ("ssm", "ssm_conv", "conv", *RINGS, "slot_k", "slot_v")  # the rest of a state counts, or chooses


def linearize(layer: Mixer, state: State, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `Mixer.linearize`."""
    config, position = layer.config, state["position"]
    state = {name: z.detach().double() if z.is_floating_point() else z for name, z in state.items()}
    memory = {name: state[name] for name in MEMORY if name in state}
    size = sum(z.numel() for z in memory.values())
    if len(position) != 1:
        raise StateError(f"linearize takes the state of one row, got {len(position)}; select one")
    if layer.kind != "ssm" and layer.window is None:
        raise StateError("a layer that reads the whole past has no state of fixed size: linearize one with a window")
    if x is not None and (x.shape != (config.hidden_size,) or not x.isfinite().all()):
        raise StateError(f"x must be finite numbers [hidden_size], [{config.hidden_size}], got {list(x.shape)}")
    if size > MOST_NUMBERS:
        raise StateError(f"the state has {size} numbers, above {MOST_NUMBERS}: take a smaller window, heads or slots")
    twin = copy.deepcopy(layer).double().requires_grad_(False)
    at = Step(position, state["document"], config.chunk_size)

    def by_age(name: str, tokens: int) -> Tensor:
        """Where in a ring the entries are, newest first, after so many tokens."""
        entries = memory[name].shape[1]
        stride = config.fading_stride if name.startswith("fading") else 1
        return (tokens // stride - 1 - torch.arange(entries, device=position.device)) % entries

    def flat(state: State, tokens: int) -> Tensor:
        rows = [state[name][0, by_age(name, tokens)] if name in RINGS else state[name][0] for name in memory]
        return torch.cat([z.flatten() for z in rows])

    def step(numbers: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = numbers.split([z.numel() for z in memory.values()])
        given = dict(state)
        for (name, z), part in zip(memory.items(), parts, strict=True):
            rows = part.view(z.shape[1:])
            given[name] = (rows[by_age(name, before).argsort()] if name in RINGS else rows)[None]
        o, new = twin.step(x[None], given, at)
        return flat(new, before + 1), o[0]

    before = int(position)
    x = torch.zeros(config.hidden_size, device=position.device) if x is None else x.detach()
    with use_backend("naive"):
        (A, B), (C, D) = torch.func.jacrev(step, (0, 1), chunk_size=64)(flat(state, before), x.double())
    return A, B, C, D
