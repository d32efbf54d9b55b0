"""The state is a value: rows, copies, types, bytes, files."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from cases import draw_tokens, make_model, same_state, small_preset
from safetensors.torch import load, save_file

from bmojo.errors import BMojoError, StateError
from bmojo.memory.spec import layer_spec
from bmojo.memory.state import FORMAT, MemoryState, require_fit
from bmojo.nn import count
from bmojo.presets import PRESETS


@pytest.fixture
def model():
    return make_model(small_preset("bmojo"), dtype=torch.float32)


@pytest.fixture
def state(model) -> MemoryState:
    with torch.no_grad():
        return model(draw_tokens(3, 22))[1]


def test_rows_and_copies(state):
    chosen = state.select([2, 0, 2])
    assert chosen.batch_size == 3
    for got, layer in zip(chosen.layers, state.layers, strict=True):
        assert all(torch.equal(got[name], layer[name][[2, 0, 2]]) for name in layer)
    assert torch.equal(state.repeat(2).layers[0]["k"], state.layers[0]["k"][[0, 0, 1, 1, 2, 2]])
    assert state.select(torch.tensor([], dtype=torch.int64)).batch_size == 0
    for wrong in ([3], [-1], [[0]]):
        with pytest.raises(StateError, match="below the batch size 3"):
            state.select(wrong)
    copy = state.clone()
    copy.layers[0]["k"].zero_()
    assert state.layers[0]["k"].any()


def test_detach(model):
    _, state = model(draw_tokens(1, 9))
    assert state.layers[0]["k"].requires_grad
    assert not any(z.requires_grad for layer in state.detach().layers for z in layer.values())


def test_a_change_of_dtype_leaves_scores_and_recurrent_states_alone(state):
    half = state.to(dtype=torch.bfloat16)
    for kind, layer, before in zip(state.config.kinds, half.layers, state.layers, strict=True):
        spec = layer_spec(state.config, kind)
        for name, tensor in layer.items():
            assert tensor.dtype == (torch.bfloat16 if spec[name].kind == "verbatim" else before[name].dtype), name
    assert half.nbytes < state.nbytes
    assert state.to("cpu").layers[0]["k"].dtype == torch.float32


def test_a_model_of_one_layer_has_a_position():
    state = make_model(small_preset("bmojo", num_layers=1)).empty_state(2)
    assert state.position.tolist() == [0, 0]
    assert state.document.tolist() == [-1, -1]


def test_position_and_bytes(state):
    assert state.position.tolist() == [22] * 3
    assert state.document.tolist() == [-1] * 3
    assert state.nbytes == sum(state.layer_nbytes()) == sum(z.nbytes for layer in state.layers for z in layer.values())


@pytest.mark.parametrize(
    ("preset", "changes"),
    [(preset, {}) for preset in PRESETS]
    + [("bmojo", {"innovation": innovation}) for innovation in ("ema", "state", "head", "random")]
    + [("bmojo", {"fading": "summary", "positions": "compact"}), ("bmojo", {"fading_span": 0})],
)
def test_bytes_are_as_counted_and_constant_where_no_cache_grows(preset, changes):
    config = small_preset(preset, **changes)
    model = make_model(config, dtype=torch.float32)
    sizes = set()
    with torch.no_grad():
        for length in (1, 5, 24, 255, 256, 257, 600):
            _, state = model(draw_tokens(1, length))
            sizes.add(state.nbytes)
            for kind, size in zip(config.kinds, state.layer_nbytes(), strict=True):
                assert size == count.layer_state_bytes(config, kind, length), f"{kind} after {length}"
            _, state = model(draw_tokens(1, 1), state)  # a step
            assert state.layer_nbytes() == [count.layer_state_bytes(config, kind, length + 1) for kind in config.kinds]
        empty = model.empty_state(1)
    assert empty.layer_nbytes() == [count.layer_state_bytes(config, kind, 0) for kind in config.kinds]
    assert len(sizes) == (1 if preset != "transformer" else 3)


def test_bytes_in_half_precision():
    config = small_preset("bmojo")
    model = make_model(config, dtype=torch.bfloat16)
    with torch.no_grad():
        _, state = model(draw_tokens(1, 30))
        _, state = model(draw_tokens(1, 1), state)
    assert state.layer_nbytes() == [count.layer_state_bytes(config, kind, 31, width=2) for kind in config.kinds]


GO_ON = """
import sys, torch
from bmojo import BMojoLM, MemoryState
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = BMojoLM.load(folder)
    with torch.no_grad():
        logits, end = model(torch.load(folder + "/more"), MemoryState.load(folder + "/state", model.config))
        last, _ = model(torch.zeros(3, 1, dtype=torch.int64), end)
    torch.save((logits, last), folder + "/out")
"""


@pytest.mark.slow
def test_a_new_process_goes_on_bit_identically(tmp_path):
    folders, expected, more = {}, {}, draw_tokens(3, 13, 1)
    for preset in PRESETS:
        model, folder = make_model(small_preset(preset), dtype=torch.float32), tmp_path / preset
        with torch.no_grad():
            _, state = model(draw_tokens(3, 22))
            logits, end = model(more, state)
            expected[preset] = logits, model(torch.zeros(3, 1, dtype=torch.int64), end)[0]
        model.save(folder)
        state.save(folder / "state")
        torch.save(more, folder / "more")
        folders[preset] = folder
    subprocess.run([sys.executable, "-c", GO_ON, *map(str, folders.values())], check=True)
    for preset, folder in folders.items():
        for got, want in zip(torch.load(folder / "out"), expected[preset], strict=True):
            assert torch.equal(got, want), preset


def test_save_and_load_are_exact(tmp_path, state):
    state.save(tmp_path / "state")
    loaded = MemoryState.load(tmp_path / "state", state.config)
    assert loaded.config == state.config
    for got, layer in zip(loaded.layers, state.layers, strict=True):
        assert got.keys() == layer.keys()
        assert all(torch.equal(got[name], layer[name]) and got[name].dtype == layer[name].dtype for name in layer)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    same_state(loaded, state, 0)


def test_an_unwritable_place_is_named(tmp_path, state):
    (tmp_path / "file").write_text("")
    with pytest.raises(BMojoError, match="can't write"):
        state.save(tmp_path / "file" / "state")


def broken_files(path, state):
    """One broken file after the other at `path`: what is wrong, and what the error says."""
    state.save(path)
    content = path.read_bytes()
    tensors = load(content)
    metadata = {"format": FORMAT, "version": "1", "config": json.dumps(state.config.to_dict())}
    yield (
        "another model",
        path.write_bytes(content),
        "belongs to another model: window is 12 here and 8 in the state; load the state with the model that made it$",
    )
    for what, part in (("empty", b""), ("cut short", content[:-100]), ("text", b"hello, world" * 9)):
        yield what, path.write_bytes(part), "can't be read"
    yield "a directory", (path.unlink(), path.mkdir()), "can't be read"
    path.rmdir()
    yield "missing", None, "no memory state"
    yield "foreign", save_file(tensors, path), "is not a memory state"
    yield "newer", save_file(tensors, path, {**metadata, "version": "2"}), "update bmojo"


def test_wrong_files_are_refused(tmp_path, state):
    path, other = tmp_path / "state", small_preset("bmojo", window=12)
    for what, _, message in broken_files(path, state):
        with pytest.raises(StateError, match=message):
            MemoryState.load(path, other if what == "another model" else state.config)


HEADER, VERSION_OF = "is damaged: its header can't be read .*; save the state again", "is damaged: its version is 'one'"
DAMAGE = {
    "no version": ({"version": None}, {}, HEADER),
    "a version that is no number": ({"version": "one"}, {}, VERSION_OF),
    "no configuration": ({"config": None}, {}, HEADER),
    "a configuration that is no JSON": ({"config": "{"}, {}, HEADER),
    "a configuration of a later bmojo": ({"config": '{"windoww": 3}'}, {}, HEADER),
    "a missing tensor": ({}, {"layers.0.k": None}, r"layers.0.k is missing, expected \[batch, 8, 2, 8\]; save"),
    "a tensor of another shape": (
        {},
        {"layers.0.k": torch.zeros(3, 1, 1, 1)},
        r"layers.0.k is \(3, 1, 1, 1\), expected",
    ),
    "a tensor of another layer": ({}, {"layers.9.k": torch.zeros(1)}, "it holds layers.9.k, which this model has not"),
    "a tensor of another name": ({}, {"other": torch.zeros(1), "zoo": torch.zeros(1)}, "it holds other, which"),
    "keys of whole numbers": (
        {},
        {"layers.0.k": torch.zeros(3, 8, 2, 8, dtype=torch.int64)},
        "layers.0.k must be torch.float32 or torch.float64 or torch.bfloat16 or "
        "torch.float16, got torch.int64; save the state again",
    ),
    "rows that are lost": ({}, {"layers.1.conv": torch.zeros(2, 3, 16)}, "its tensors differ in batch size; save"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_contents_are_refused(tmp_path, state, damage):
    path = tmp_path / "state"
    state.save(path)
    metadata = {"format": FORMAT, "version": "1", "config": json.dumps(state.config.to_dict())}
    *changes, message = DAMAGE[damage]
    metadata, tensors = ({**old, **new} for old, new in zip((metadata, load(path.read_bytes())), changes, strict=True))
    metadata, tensors = ({n: z for n, z in part.items() if z is not None} for part in (metadata, tensors))
    save_file(tensors, path, metadata)
    with pytest.raises(StateError, match=f"^{re.escape(str(path))} .*{message}"):
        MemoryState.load(path, state.config)


def test_a_note_is_found_again(tmp_path, state):
    dataclasses.replace(state, note={"text": "so far", "at": [1, None]}).save(tmp_path / "state")
    loaded = MemoryState.load(tmp_path / "state")
    assert loaded.note == {"text": "so far", "at": [1, None]}
    assert loaded.select([0]).note == loaded.note
    path = tmp_path / "without"  # as a bmojo wrote it that knew no notes
    metadata = {"format": FORMAT, "version": "1", "config": json.dumps(state.config.to_dict())}
    save_file(load((tmp_path / "state").read_bytes()), path, metadata)
    assert MemoryState.load(path).note == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_kind_of_state_comes_back(tmp_path, preset):
    config = small_preset(preset)
    mixed = config.replace(pattern=["full", *config.pattern], num_layers=len(config.pattern) + 1)
    for each in (config, mixed):
        with torch.no_grad():
            state = make_model(each, dtype=torch.float32)(draw_tokens(2, 13))[1]
        state.save(tmp_path / "state")
        same_state(MemoryState.load(tmp_path / "state"), state, 0)


@pytest.mark.parametrize(
    ("preset", "cut", "message"),
    [
        ("transformer", (..., slice(1)), r"layers.1.{} is \(2, 256, 2, 1\), expected"),
        ("swa", (slice(None), slice(7)), r"layers.1.{} is \(2, 7, 2, 8\), expected \[batch, 8, 2, 8\]"),
        ("bmojo", (slice(None), slice(7)), r"layers.1.{} is \(2, 7, 2, 8\), expected \[batch, 8, 2, 8\]"),
    ],
)
def test_only_the_length_of_a_cache_is_free(tmp_path, preset, cut, message):
    with torch.no_grad():
        state = make_model(small_preset(preset), dtype=torch.float32)(draw_tokens(2, 13))[1]
    state.save(tmp_path / "state")
    tensors = load((tmp_path / "state").read_bytes())
    metadata = {"format": FORMAT, "version": "1", "config": json.dumps(state.config.to_dict())}
    for name in ("k", "v"):
        changed = {**tensors, f"layers.1.{name}": tensors[f"layers.1.{name}"][cut].contiguous()}
        save_file(changed, tmp_path / "state", metadata)
        with pytest.raises(StateError, match=message.format(name)):
            MemoryState.load(tmp_path / "state")


def test_a_state_fits_a_model_of_its_configuration_batch_and_dtype(state):
    config, single = state.config, torch.float32
    require_fit(state, config, 3, single)
    for wrong, message in (
        ((state, small_preset("bmojo", window=12), 3, single), "^the state belongs to another model: window is 12"),
        ((state, config, 2, single),
         r"^the state has batch size 3, the tokens 2; use state.select or state.repeat "
         r"\(of a cache: batch_select_indices, batch_repeat_interleave\)$"),
        ((state, config, 3, torch.bfloat16),
         r"^the state holds torch.float32 rows, the model torch.bfloat16; use state.to\(dtype=torch.bfloat16\)$"),
    ):  # fmt: skip
        with pytest.raises(StateError, match=message):
            require_fit(*wrong)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the rows of a state may then be of either type
        require_fit(state, config, 3, torch.bfloat16)


def test_scores_and_positions_have_the_digits_that_they_need(state):
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype in floats:
        require_fit(state.to(dtype=dtype), state.config, 3, dtype)
    for name, allowed in (("rls_A", (torch.float32, torch.float64)), ("slot_position", (torch.int64,))):
        for dtype in (*floats, torch.int64, torch.int32):
            first = {**state.layers[0], name: state.layers[0][name].to(dtype)}
            changed = dataclasses.replace(state, layers=(first, state.layers[1]))
            if dtype in allowed:
                require_fit(changed, state.config, 3, torch.float32)
            else:
                message = (
                    f"^{name} of the state must be {' or '.join(map(str, allowed))}, got {dtype}; save the state again$"
                )
                with pytest.raises(StateError, match=message):
                    require_fit(changed, state.config, 3, torch.float32)


def test_select_takes_indices_alone(state):
    with pytest.raises(StateError, match="rows must be indices"):
        state.select(torch.ones(state.batch_size, dtype=torch.bool))


def test_a_state_is_repeated_once_at_least(state):
    with pytest.raises(StateError, match="times must be at least 1, got 0"):
        state.repeat(0)
    for layer, kept in zip(state.repeat(1).layers, state.layers, strict=True):
        assert all(torch.equal(layer[name], kept[name]) for name in kept)


@pytest.mark.parametrize("preset", PRESETS)
def test_states_of_streams_are_one_batch_and_come_apart_again(preset):
    model, tokens = make_model(small_preset(preset), dtype=torch.float64), draw_tokens(3, 270)
    with torch.no_grad():
        states = [model(tokens[i : i + 1, :length])[1] for i, length in enumerate((5, 270, 17))]
        batch = MemoryState.cat(states)
        assert batch.position.tolist() == [5, 270, 17]
        for got, state in zip(batch.split(), states, strict=True):
            same_state(got, state)
            assert got.nbytes == state.nbytes
        more = draw_tokens(3, 9, seed=1)
        for piece in (more[:, :8], more[:, 8:]):
            logits, batch = model(piece, batch)
            for i, state in enumerate(states):
                alone, states[i] = model(piece[i : i + 1], state)
                torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-9, atol=1e-9)
        for got, state in zip(batch.split(), states, strict=True):
            assert got.nbytes == state.nbytes


def test_states_that_are_no_batch(model):
    empty = model.empty_state()
    for other, message in (
        (empty.to(dtype=torch.bfloat16), "different dtypes or devices"),
        (empty.tracked(), "some are tracked and some are not"),
        (make_model(small_preset("gdn")).empty_state(), "another model"),
    ):
        with pytest.raises(StateError, match=message):
            MemoryState.cat([empty, other])
