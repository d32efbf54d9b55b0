"""The Jacobians of a step are those that finite differences measure; the window is a shift; refusals."""

from __future__ import annotations

import pytest
import torch

from bmojo.config import ModelConfig
from bmojo.errors import StateError
from bmojo.memory.step import Step
from bmojo.nn.mixer import Mixer

SMALL = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "window": 4, "chunk_size": 4, "ssm_head_dim": 4,
         "ssm_state_size": 2, "innovation_dim": 4}  # fmt: skip
LAYERS = {
    "ssd": {"pattern": ("ssm",)},
    "gdn": {"pattern": ("ssm",), "ssm": "gdn"},
    "s6": {"pattern": ("ssm",), "ssm": "s6"},
    "window": {"pattern": ("attention",), "conv_size": 2},
    "bmojo": {"fading_span": 4, "eidetic_slots": 3, "conv_size": 2},
    "summary": {"fading_span": 4, "fading": "summary", "ssm": "gdn"},
    "two queries": {"fading_span": 4, "ssm": "s6", "tie_sources": False, "eidetic_slots": 2, "innovation": "state"},
}


def a_layer(name, tokens):
    torch.manual_seed(0)
    layer = Mixer(ModelConfig(**SMALL, **LAYERS[name])).double()
    with torch.no_grad():
        _, state = layer(torch.randn(1, tokens, 8, dtype=torch.float64))
    return layer, state, torch.randn(8, dtype=torch.float64)


def by_age(state, floats, config):
    """The numbers of a state, rings newest first: written out, entry by entry."""
    numbers = []
    for name in floats:
        rows = state[name][0]
        if name in ("k", "v", "fading_k", "fading_v"):
            stride = config.fading_stride if "fading" in name else 1
            newest = int(state["position"]) // stride - 1
            rows = torch.stack([rows[(newest - age) % len(rows)] for age in range(len(rows))])
        numbers.append(rows.flatten())
    return torch.cat(numbers)


@pytest.mark.parametrize("tokens", [2, 11])  # within the window, and beyond all; the next token ends a chunk, or not
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_derivative_of_a_step(name, tokens):
    layer, state, x = a_layer(name, tokens)
    A, B, C, D = layer.linearize(state, x)
    order = ("ssm", "ssm_conv", "conv", "k", "v", "fading_k", "fading_v", "slot_k", "slot_v")
    floats = [entry for entry in order if entry in state]
    assert A.shape == (len(A), len(A))
    assert B.shape == (len(A), 8)
    assert C.shape == (8, len(A))
    assert D.shape == (8, 8)

    def run(state, x):
        with torch.no_grad():
            o, new = layer.step(x[None], state, Step(state["position"], state["document"], 4))
        return by_age(new, floats, layer.config), o[0]

    size = 1e-6
    dx = size * torch.randn(8, dtype=torch.float64)
    nudge = {entry: size * torch.randn_like(state[entry]) if entry in floats else 0 for entry in state}
    up, down = ({entry: state[entry] + sign * nudge[entry] for entry in state} for sign in (1, -1))
    ds = by_age({**nudge, "position": state["position"]}, floats, layer.config)
    (s1, o1), (s0, o0) = run(up, x + dx), run(down, x - dx)
    torch.testing.assert_close((s1 - s0) / 2, A @ ds + B @ dx, rtol=1e-4, atol=1e-10)
    torch.testing.assert_close((o1 - o0) / 2, C @ ds + D @ dx, rtol=1e-4, atol=1e-10)


def test_the_window_is_the_shift():
    layer, state, x = a_layer("window", 11)
    A, _, _, _ = layer.linearize(state, x)
    width = layer.config.num_kv_heads * layer.config.head_dim
    tail = 1 * 8  # of the keys' convolution
    starts = {"k": tail, "v": tail + 4 * width}
    for start in starts.values():
        ring = A[start : start + 4 * width, start : start + 4 * width]
        assert torch.equal(ring, torch.diag(torch.ones(3 * width), -width).double())
    assert not torch.linalg.matrix_power(A, 5).any()


def test_the_dtype_of_the_layer_does_not_matter():
    layer, state, x = a_layer("bmojo", 7)
    exact = layer.linearize(state, x)
    single = layer.float().linearize(
        {n: z.float() if z.is_floating_point() else z for n, z in state.items()}, x.float()
    )
    for a, b in zip(single, exact, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_refused():
    layer, state, _ = a_layer("bmojo", 5)
    with pytest.raises(StateError, match="one row, got 2"):
        layer.linearize({name: torch.cat((z, z)) for name, z in state.items()})
    for x in (torch.zeros(3), torch.zeros(1, 8), torch.full((8,), torch.nan)):
        with pytest.raises(StateError, match=r"x must be finite numbers \[hidden_size\], \[8\], got "):
            layer.linearize(state, x)
    full = Mixer(ModelConfig(**{**SMALL, "window": None, "pattern": ("attention",)}))
    with pytest.raises(StateError, match="no state of fixed size"):
        full.linearize(full.empty_state(1))
    large = Mixer(ModelConfig(**{**SMALL, "window": 800, "pattern": ("attention",)}))
    with pytest.raises(StateError, match="above 8192"):
        large.linearize(large.empty_state(1))
