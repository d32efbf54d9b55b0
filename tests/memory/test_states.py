"""A folder of memories: names, versions, whose they are, and what is damaged."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import draw_tokens, make_model, same_state, small_preset

from bmojo.errors import StateError, StoreError
from bmojo.memory import StateStore


@pytest.fixture(scope="module")
def model():
    return make_model(small_preset("bmojo"), dtype=torch.float32)


@pytest.fixture(scope="module")
def states(model):
    with torch.no_grad():
        return [model(draw_tokens(1, 9 + i, i), model.empty_state().tracked())[1] for i in range(3)]


@pytest.fixture
def store(model, tmp_path) -> StateStore:
    return StateStore(tmp_path / "memories", model.config, model.fingerprint())


def test_versions_under_a_name(store, model, states):
    assert [store.put("contract", state) for state in states] == [1, 2, 3]
    same_state(store.get("contract"), states[2], 0)
    same_state(store.get("contract", version=1), states[0], 0)
    again = StateStore(store.folder, model.config, model.fingerprint())
    assert again.names() == {"contract": [1, 2, 3]}
    store.delete("contract", version=3)
    same_state(again.get("contract"), states[1], 0)
    store.rename("contract", "old contract")
    assert again.names() == {"old contract": [1, 2]}
    store.delete("old contract")
    assert again.names() == {}


def test_the_note_is_kept(store, model, states):
    states[0].note["last_token"] = 7
    store.put("talk", states[0])
    assert store.get("talk").note == {"last_token": 7, "fingerprint": model.fingerprint()}
    assert states[0].note == {"last_token": 7}


NAMES = [
    "a",
    "A",
    "../up",
    "..",
    ".",
    "/etc/passwd",
    "user 42/chat",
    "naïve",
    "日記",
    "a%2Fb",
    "a/b",
    "nul\0",
    ".hidden",
]


def test_any_text_is_a_name_and_none_leaves_the_folder(store, states, tmp_path):
    for number, name in enumerate(NAMES):
        store.put(name, states[number % 3])
    assert sorted(store.names()) == sorted(NAMES)
    assert os.listdir(tmp_path) == ["memories"]
    same_state(store.get("../up"), states[2], 0)
    for name in NAMES:
        store.delete(name)
    assert os.listdir(store.folder) == ["store.json"]


@pytest.mark.parametrize("name", ["", "x" * 201, "\ud800"])
def test_names_that_no_folder_can_have(store, states, name):
    with pytest.raises(StoreError, match="must be text of 1 to 200 bytes"):
        store.put(name, states[0])


def test_what_is_not_there(store, states):
    store.put("contract", states[0])
    store.put("letter", states[0])
    for do in (store.get, store.delete, lambda name: store.rename(name, "other")):
        with pytest.raises(StoreError, match=r"no state 'contrakt'.*did you mean 'contract'"):
            do("contrakt")
    with pytest.raises(StoreError, match="no version 4 of 'contract'; there are 1"):
        store.get("contract", version=4)
    with pytest.raises(StoreError, match="there is a state 'letter'"):
        store.rename("contract", "letter")


def test_another_model_is_refused_with_the_difference(store, model, states):
    other = make_model(small_preset("bmojo"), seed=1, dtype=torch.float32)
    with pytest.raises(StoreError, match=rf"fingerprint {model.fingerprint()}, this one has {other.fingerprint()}"):
        StateStore(store.folder, other.config, other.fingerprint())
    wider = small_preset("bmojo", eidetic_slots=9)
    with pytest.raises(StoreError, match=r"another model's.*eidetic_slots is 9 here and 5"):
        StateStore(store.folder, wider, model.fingerprint())
    with pytest.raises(StateError, match="eidetic_slots is 5 here and 9"):
        store.put("wide", make_model(wider).empty_state())
    elsewhere = StateStore(store.folder.parent / "others", model.config, other.fingerprint())
    elsewhere.put("a", states[0])
    store.put("a", states[0])
    os.replace(elsewhere.folder / "a" / "00000001.safetensors", store.folder / "a" / "00000001.safetensors")
    with pytest.raises(StoreError, match=r"00000001.safetensors is of a model with fingerprint"):
        store.get("a")


def test_a_damaged_file_is_named_and_the_rest_served(store, states):
    for state in states:
        store.put("contract", state)
    path = store.folder / "contract" / "00000003.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-1], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"00000003.safetensors"):
            store.get("contract")
    same_state(store.get("contract", version=2), states[1], 0)
    (store.folder / ".put.killed").mkdir()  # what a put leaves that was killed
    (store.folder / ".put.killed" / "draft").write_bytes(content[:100])
    assert store.names() == {"contract": [1, 2, 3]}
    assert store.put("contract", states[0]) == 4


def test_a_folder_that_is_no_store(store, model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("full", "file"):
        with pytest.raises(StoreError, match="no store of states"):
            StateStore(tmp_path / name, model.config, "f")
    about = store.folder / "store.json"
    for content, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"format": "other"}), "its format is 'other'"),
        (json.dumps({"format": "bmojo.state-store", "version": 2}), "has format 2, this bmojo reads up to 1"),
        (json.dumps({"format": "bmojo.state-store", "version": 1}), "damaged"),
    ):
        about.write_text(content)
        with pytest.raises(StoreError, match=message):
            StateStore(store.folder, model.config, model.fingerprint())


def test_many_at_once_lose_nothing(store, states):
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda i: store.put("talk", states[i % 3]), range(12)))
    assert sorted(versions) == store.names()["talk"] == list(range(1, 13))


def test_a_fingerprint_is_that_of_the_weights(model, tmp_path):
    assert len(model.fingerprint()) == 16
    model.save(tmp_path)
    assert type(model).load(tmp_path).fingerprint() == model.fingerprint()
    same = make_model(small_preset("bmojo"), dtype=torch.float32)
    assert same.fingerprint() == model.fingerprint()
    with torch.no_grad():
        same.embed.weight[0, 0] += 1
    assert same.fingerprint() != model.fingerprint()
    assert make_model(small_preset("bmojo")).fingerprint() != model.fingerprint()  # float64
