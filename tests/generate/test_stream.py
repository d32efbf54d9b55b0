import subprocess
import sys

import numpy as np
import pytest
import torch

from bmojo import BMojoLM, MemoryState, presets
from bmojo.errors import ConfigError, DataError, StateError
from bmojo.generate import Stream, generate, load_stream_state

FIELDS = {"vocab_size": 50, "hidden_size": 32, "num_heads": 2, "chunk_size": 8, "ssm_head_dim": 16}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def new_model(name="bmojo"):
    torch.manual_seed(0)
    extra = {"window": 16} if name in ("bmojo", "hybrid") else {}
    return BMojoLM(presets.get(name, "tiny", **FIELDS, **extra))


@pytest.mark.parametrize("name", ["bmojo", "transformer", "gdn", "mamba", "hybrid"])
def test_greedy_is_the_argmax_of_the_full_forward_pass(name):
    model = new_model(name).double()
    ids = list(PROMPT)
    for _ in range(40):
        logits, _ = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    assert list(generate(model, PROMPT, max_new_tokens=40, temperature=0)) == ids[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("cut", [1, 7, 29])
def test_going_on_from_a_state_equals_one_stream(tmp_path, temperature, cut):
    model = new_model()
    choice = {"temperature": temperature, "top_p": 0.95, "seed": 5}
    whole = list(generate(model, PROMPT, max_new_tokens=30, **choice))
    stream = Stream(model, PROMPT, max_new_tokens=cut, **choice)
    first = list(stream)
    on = Stream(model, [stream.last], state=stream.state, max_new_tokens=30 - cut, **choice)
    assert first + list(on) == whole
    stream.save(tmp_path / "state.safetensors")
    state, unread = load_stream_state(tmp_path / "state.safetensors", model)
    assert first + list(generate(model, unread, state=state, max_new_tokens=30 - cut, **choice)) == whole


CHILD = """
import sys, torch
from bmojo import BMojoLM
from bmojo.generate import generate, load_stream_state
torch.set_num_threads(1)
model = BMojoLM.load(sys.argv[1] + "/model")
state, unread = load_stream_state(sys.argv[1] + "/state", model)
print(*generate(model, unread, state=state, max_new_tokens=20, temperature=0.9, seed=5))
"""


@pytest.mark.slow
def test_another_process_goes_on(tmp_path):
    model = new_model()
    whole = list(generate(model, PROMPT, max_new_tokens=30, temperature=0.9, seed=5))
    stream = Stream(model, PROMPT, max_new_tokens=10, temperature=0.9, seed=5)
    first = list(stream)
    model.save(tmp_path / "model")
    stream.save(tmp_path / "state")
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True)
    assert first + [int(token) for token in done.stdout.split()] == whole


def test_the_saved_state_is_a_memory_state(tmp_path):
    model = new_model()
    stream = Stream(model, PROMPT, max_new_tokens=4, temperature=0)
    ids = list(stream)
    stream.save(tmp_path / "state")
    state = MemoryState.load(tmp_path / "state", model.config)
    expected, _ = model(torch.tensor([PROMPT + ids]))
    logits, _ = model(torch.tensor([ids[-1:]]), state)
    torch.testing.assert_close(logits[0, -1], expected[0, -1], rtol=1e-4, atol=1e-4)
    _, plain = model(torch.tensor([PROMPT]))
    plain.save(tmp_path / "plain")
    assert load_stream_state(tmp_path / "plain", model)[1] == []


def test_a_state_without_a_last_token_has_read_everything(tmp_path):
    model = new_model()
    whole = list(generate(model, PROMPT, max_new_tokens=20, temperature=0))
    first = Stream(model, PROMPT[:4], max_new_tokens=1, temperature=0)
    next(first)
    first.save(tmp_path / "state")
    state, _ = load_stream_state(tmp_path / "state", model)  # its note tells of a token
    for prompt, stop in ((PROMPT, ()), (PROMPT, whole[:1])):
        stream = Stream(model, prompt, max_new_tokens=len(stop), stop_ids=stop, temperature=0)
        assert list(stream) == []
        stream.save(tmp_path / "state")
        state, unread = load_stream_state(tmp_path / "state", model)
        assert unread == []
        assert list(generate(model, whole[:1], state=state, max_new_tokens=19, temperature=0)) == whole[1:]


def test_the_callers_state_is_left_as_it_is():
    model = new_model()
    _, state = model(torch.tensor([PROMPT]))
    before = state.clone()
    list(generate(model, [7], state=state, max_new_tokens=20))
    for layer, old in zip(state.layers, before.layers, strict=True):
        assert all(torch.equal(layer[name], old[name]) for name in old)


def test_memory_is_constant():
    model = new_model()
    stream = Stream(model, PROMPT, max_new_tokens=100, temperature=0)
    size = stream.state.nbytes
    buffers = None
    for i, _ in enumerate(stream):
        assert stream.state.nbytes == size
        if i == 50:
            buffers = [layer["k"].data_ptr() for layer in stream._decoder._state.layers]  # `state` is a copy
    assert [layer["k"].data_ptr() for layer in stream._decoder._state.layers] == buffers


def test_its_state_is_a_value():
    stream = Stream(new_model(), PROMPT, max_new_tokens=20, temperature=0)
    next(stream)
    state = stream.state
    kept = state.clone()
    list(stream)
    for layer, old in zip(state.layers, kept.layers, strict=True):
        assert all(torch.equal(layer[name], old[name]) for name in old)


def test_a_long_prompt_is_read_in_segments():
    model = new_model().double()
    prompt = np.random.default_rng(0).integers(0, 50, 1100)
    logits, _ = model(torch.from_numpy(prompt)[None])
    (token,) = generate(model, prompt.tolist(), max_new_tokens=1, temperature=0)
    assert token == int(logits[0, -1].argmax())


def test_stop_ids_end_the_stream():
    model = new_model()
    ids = list(generate(model, PROMPT, max_new_tokens=20))
    stop = ids[5]
    stream = Stream(model, PROMPT, max_new_tokens=20, stop_ids=[stop])
    assert list(stream) == ids[: ids.index(stop)]
    assert list(stream) == []


def choose(weights, seeds=4000, **choice):
    """Share of each token among draws from the given weights."""
    model = new_model()
    stream = Stream(model, PROMPT, max_new_tokens=1, **choice)
    logits = torch.tensor(weights).log()
    draws = []
    for seed in range(seeds):
        stream.seed = seed
        draws.append(stream._choose(logits))
    return np.bincount(draws, minlength=len(weights)) / seeds


def test_draws_follow_the_probabilities():
    weights = [0.1, 0.4, 0.2, 0.3]
    np.testing.assert_allclose(choose(weights), weights, atol=0.03)
    np.testing.assert_allclose(choose(weights, top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(choose(weights, top_p=0.6), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(choose(weights, top_p=0.3), [0, 1, 0, 0])
    sharp = np.square(weights) / np.square(weights).sum()
    np.testing.assert_allclose(choose(weights, temperature=0.5), sharp, atol=0.03)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt_ids": []}, DataError, "give a prompt"),
        ({"prompt_ids": [50]}, DataError, r"token ids must lie in 0\.\.49, got 50"),
        ({"temperature": -1.0}, ConfigError, "temperature must be at least 0"),
        ({"top_p": 0.0}, ConfigError, "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": 0}, ConfigError, "top_k must be at least 1, got 0"),
        ({"max_new_tokens": -1}, ConfigError, "max_new_tokens"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        generate(new_model(), **{"prompt_ids": PROMPT, "max_new_tokens": 1, **change})


def test_refuses_a_state_of_another_batch_size_or_model():
    model = new_model()
    with pytest.raises(StateError, match="batch size 2"):
        generate(model, PROMPT, max_new_tokens=1, state=model.empty_state(2))
    with pytest.raises(StateError, match="another model"):
        generate(model, PROMPT, max_new_tokens=1, state=new_model("gdn").empty_state())
