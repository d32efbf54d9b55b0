"""Random arguments of `bmojo.memory.read`, for layouts of every sort."""

from __future__ import annotations

import torch

from bmojo.memory.layout import Layout, make_layout
from bmojo.memory.read import Slots, Source, slot_spans

CHUNK, WINDOW, FADING, EACH = 4, 8, 4, 5
TIME = 21
PADDED = torch.ones(2, TIME, dtype=torch.bool)
PADDED[0, :3] = PADDED[0, 9] = PADDED[1, 15:] = False
PACKED = torch.tensor([[0] * 6 + [1] * 2 + [2] * 13, [5] * 20 + [6]])
CONTINUED = {"position": torch.tensor([13, 0]), "document": torch.tensor([0, 5])}
CALLS = {
    "plain": {},
    "continued": CONTINUED | {"position": torch.tensor([12, 4])},
    "inside a chunk": CONTINUED,
    "padded": {"mask": PADDED},
    "packed": {"document_ids": PACKED},
    "all of it": CONTINUED | {"mask": PADDED, "document_ids": PACKED},
}


def held_positions(layout: Layout, scale: int = 1) -> torch.Tensor:
    """Random positions [2, N, EACH] before each chunk; -1: an empty slot."""
    place, generator = (2, layout.chunks, EACH), torch.Generator().manual_seed(1)
    position = torch.randint(-1, 30 * scale, place, generator=generator).to(layout.position.device)
    return torch.where(position < layout.position[:, :: layout.chunk, None], position, -1)


def drawn(
    call: str, stride: int = 1, heads: int = 4, groups: int = 2, key_dim: int = 3, value_dim: int = 3, *,
    scale: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, list[Source], Slots, Layout]:  # fmt: skip
    """For a layout of CALLS, with every size in tokens `scale` times as large."""
    chunk, window, fading = CHUNK * scale, WINDOW * scale, FADING * scale
    given = {n: z * scale if n == "position" else z for n, z in CALLS[call].items()}
    given = {n: z.repeat_interleave(scale, 1) if z.ndim > 1 else z for n, z in given.items()}
    given = {n: z.to(device) for n, z in given.items()}
    layout = make_layout(2, TIME * scale, chunk, torch.device(device), **given)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        exact = torch.randn(2, *shape, dtype=torch.float64, generator=generator).bfloat16()  # the same in any dtype
        return exact.to(device, dtype).requires_grad_()

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(count, groups, key_dim), normal(count, groups, value_dim)

    size = (window + fading) // stride
    sources = [
        Source(*rows(window + layout.slots), window, 1, 0, window),
        Source(*rows(size + layout.slots // stride), size, stride, window, fading),
    ]
    k, v = (z.unflatten(1, (layout.chunks, EACH)) for z in rows(layout.chunks * EACH))
    slots = Slots(k, v, *slot_spans(held_positions(layout, scale), layout, window))
    return normal(layout.slots, heads, key_dim), sources, slots, layout
