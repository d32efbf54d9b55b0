"""Long look-ups: what is read once and asked of copies equals reading it anew for every question."""

import numpy as np
import pytest
import torch

from bmojo import presets
from bmojo.data.synthetic import NO_ANSWER, make_task
from bmojo.errors import ConfigError
from bmojo.eval.long import Neighbours, Retrieved, Stored, Streamed, look_up
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.storage import Storage
from bmojo.memory.store import Store
from bmojo.nn.model import BMojoLM

TASK = make_task("lookup", length=3000, facts=6, digits=2)
SMALL = {"hidden_size": 16, "ssm_head_dim": 8, "num_heads": 2, "intermediate_size": 16, "vocab_size": 256}


def small(preset="bmojo", **changes):
    torch.manual_seed(0)
    return BMojoLM(presets.get(preset, **{**SMALL, **changes}))


@pytest.fixture
def asked():
    return {name: torch.from_numpy(values) for name, values in TASK.haystack(0).items()}


@pytest.mark.parametrize("preset", ["bmojo", "transformer"])
@torch.inference_mode()
def test_questions_are_asked_of_copies_of_one_reading(preset, asked):
    model = small(preset)
    streamed = Streamed(model)
    streamed.read(asked["haystack"])
    right = streamed.answer(asked["tokens"], asked["labels"])
    for row, labels, found in zip(asked["tokens"], asked["labels"], right, strict=True):
        logits, _ = model(torch.cat((asked["haystack"], row))[None])
        at = labels != NO_ANSWER
        assert (logits[0, 3000:][at].argmax(-1) == labels[at]).tolist() == found.tolist()
    sizes = streamed.nbytes()["state"]
    assert sizes == model(asked["haystack"][None])[1].nbytes


@torch.inference_mode()
def test_a_store_gives_what_reading_with_it_gives(asked):
    model = small(storage_layers=[-1], storage_stride=4, chunk_size=16, window=16, storage_block=16, storage_blocks=2)
    stored = Stored(model, Store(MemoryEngine(), publish=0.0))
    stored.read(asked["haystack"])
    right = stored.answer(asked["tokens"], asked["labels"])
    without = Streamed(model)
    without.read(asked["haystack"])
    differs = 0
    for row, labels, found in zip(asked["tokens"], asked["labels"], right, strict=True):
        text = torch.cat((asked["haystack"], row))[None]
        logits, _ = model(text, storage=Storage(model.config, dtype=torch.float16))
        at = labels != NO_ANSWER
        assert (logits[0, 3000:][at].argmax(-1) == labels[at]).tolist() == found.tolist()
        mine = model.logits(stored.features(row[None], stored.state))
        torch.testing.assert_close(mine[0], logits[0, 3000:], rtol=1e-4, atol=1e-5)
        differs += bool((mine - model(row[None], without.state)[0]).abs().max() > 1e-3)
    assert differs == len(right)


@torch.inference_mode()
def test_reading_settings_may_change_after_the_text_was_read(asked):
    store = Store(MemoryEngine(), publish=0.0)
    settings = {"storage_layers": [-1], "chunk_size": 16, "window": 16, "storage_block": 16}
    stored = Stored(small(storage_stride=4, **settings), store)
    stored.read(asked["haystack"])
    coarse = Stored(small(storage_stride=16, **settings), Store(MemoryEngine(), publish=0.0))
    coarse.read(asked["haystack"])
    row = asked["tokens"][:1]
    changed = stored.with_settings(storage_stride=16)
    expected = coarse.features(row, coarse.state)
    rest = 16 - 3000 % 16  # of the stride that the text ended in: it goes on with what was found for it
    found = changed.features(row, changed.state)
    torch.testing.assert_close(found[:, rest:], expected[:, rest:], rtol=1e-5, atol=1e-5)
    assert (stored.features(row, stored.state) - expected)[:, rest:].abs().max() > 1e-3


@torch.inference_mode()
def test_nearest_neighbours_say_what_followed_the_keys_found(asked):
    model = small(storage_layers=[-1], chunk_size=16, window=16, storage_block=16, storage_blocks=1000)
    neighbours = Neighbours(model, Store(MemoryEngine(), publish=0.0))
    neighbours.read(asked["haystack"])
    neighbours.share = 0.0
    alone = neighbours.answer(asked["tokens"], asked["labels"])
    assert (alone == Streamed.answer(_without(neighbours), asked["tokens"], asked["labels"])).all()
    with torch.no_grad():
        model.blocks[-1].mixer.k_proj.weight.zero_()  # every token stored weighs the same
    again = Neighbours(model, Store(MemoryEngine(), publish=0.0))
    again.read(asked["haystack"])
    again.share = 1.0
    stored = asked["haystack"][: 3000 // 16 * 16]
    digits = asked["labels"] == stored.bincount().argmax()
    right = again.answer(asked["tokens"], asked["labels"])
    assert (right.ravel() == digits[asked["labels"] != NO_ANSWER].numpy()).all()
    assert not right.any()  # the most frequent byte is a space


def _without(stored):
    plain = Streamed(stored.model)
    plain.state = stored.state
    return plain


@torch.inference_mode()
def test_plain_retrieval_finds_the_sentence_asked_for(asked):
    plain = Retrieved(small(), count=2, size=100, step=60)
    plain.read(asked["haystack"])
    at = (asked["labels"] != NO_ANSWER).long().argmax(1)
    prompts, state = plain.prepare(asked["tokens"], at)
    assert state is None
    assert prompts.shape[1] == 2 * 100 + asked["tokens"].shape[1]
    for prompt, row, place in zip(prompts, asked["tokens"], at, strict=True):
        passage, (fact, answer) = bytes(prompt[100:200].tolist()), row[: place + 3].split((place + 1, 2))
        name_and_number = b" ".join(bytes([*fact, *answer]).split()[-3:])
        assert name_and_number in passage
        assert (prompt[200:] == row).all()
    assert plain.nbytes()["text"] == 50 * 100
    assert plain.nbytes()["index"] > 0


def test_scores_of_a_look_up():
    scores = look_up(Streamed(small()), TASK, questions=4, batch_size=3)
    assert scores["questions"] == 4
    assert scores == look_up(Streamed(small()), TASK, questions=4, batch_size=1) | {
        name: scores[name] for name in ("read_us", "answer_us")
    }
    low, high = scores["exact_ci95"]
    assert low <= scores["exact"] <= high
    assert scores["read_us"] > 0


def test_exact_numbers_have_all_digits_right():
    class Half(Streamed):
        def answer(self, tokens, labels):
            return np.array([[True, True], [True, False]] * (len(tokens) // 2))

    scores = look_up(Half(small()), TASK)
    assert (scores["exact"], scores["digits"]) == (0.5, 0.75)


def test_refuses():
    with pytest.raises(ConfigError, match="vocab_size must be at least the task's 256, got 100"):
        look_up(Streamed(small(vocab_size=100)), TASK)
    with pytest.raises(ConfigError, match="the text must hold 4 passages of 2000 bytes, got 3000"):
        look_up(Retrieved(small(), size=2000, step=2000), TASK)
