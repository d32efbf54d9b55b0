"""Decoding in buffers that stay where they are, which a CUDA graph replays, equals the model itself."""

from __future__ import annotations

import pytest
import torch
from cases import close, draw_tokens, make_model, same_state, small_preset

from bmojo.errors import ConfigError
from bmojo.nn.decoder import Decoder
from bmojo.presets import PRESETS

CASES = [(name, {}) for name in ("swa", "mamba2", "gdn", "hybrid", "bmojo_f", "bmojo")]
CASES += [("bmojo", {"innovation": kind}) for kind in ("ema", "head", "state")]
CASES += [("bmojo", {"positions": "compact", "fading": "summary", "tie_sources": False})]


def started(name="bmojo", **changes):
    """A model, the state after 6 tokens in two rows, one of them behind by 3; and 19 tokens more."""
    model, tokens = make_model(small_preset(name, **changes)), draw_tokens(2, 25)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    with torch.no_grad():
        _, state = model(tokens[:, :6], mask=mask)
    return model, state, tokens[:, 6:]


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("name", "changes"), CASES)
@torch.no_grad()
def test_it_equals_the_model(name, changes, static):
    model, state, tokens = started(name, **changes)
    given, decoder = state.clone(), Decoder(model, state, static=static)
    buffers = [tensor.data_ptr() for layer in decoder._state.layers for tensor in layer.values()]
    mine = state
    for t in range(tokens.shape[1]):
        expected, mine = model(tokens[:, t : t + 1], mine)
        close(decoder(tokens[:, t]), expected[:, 0])
        same_state(decoder.state, mine)
    same_state(state, given)
    if static:
        assert buffers == [tensor.data_ptr() for layer in decoder._state.layers for tensor in layer.values()]


@pytest.mark.parametrize("static", [True, False])
@torch.no_grad()
def test_its_state_is_a_value(static):
    model, state, tokens = started()
    decoder = Decoder(model, state, static=static)
    for t in range(5):
        decoder(tokens[:, t])
    snapshot = decoder.state
    kept = snapshot.clone()
    first = [decoder(tokens[:, t]).clone() for t in range(5, 12)]
    same_state(snapshot, kept)
    decoder.state = snapshot
    again = [decoder(tokens[:, t]).clone() for t in range(5, 12)]
    assert torch.equal(torch.stack(first), torch.stack(again))
    same_state(snapshot, kept)


def test_it_is_static_on_a_gpu_where_it_can_be(monkeypatch):
    model, state, _ = started()
    assert Decoder(model, state).static is False
    whole = make_model(small_preset("transformer"))
    with pytest.raises(ConfigError, match=r"keep the whole past has a state that grows.*use static=False or a window"):
        Decoder(whole, whole.empty_state(), static=True)
    assert Decoder(whole, whole.empty_state()).static is False


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "transformer"])
@torch.inference_mode()
def test_on_a_cpu_no_part_of_the_state_is_made_anew_within_a_chunk(name):
    model = make_model(small_preset(name))
    _, state = model(draw_tokens(2, model.config.chunk_size))
    state = state.clone()
    where = [{key: z.data_ptr() for key, z in layer.items()} for layer in state.layers]
    for t in range(model.config.chunk_size - 1):
        _, state = model(draw_tokens(2, 1, t), state, donate=True)
    counts = {"position", "document", "last_y"}  # a number a row; the vector that a token leaves
    for layer, before in zip(state.layers, where, strict=True):
        assert {key: z.data_ptr() for key, z in layer.items() if key not in counts} == {
            key: address for key, address in before.items() if key not in counts
        }
