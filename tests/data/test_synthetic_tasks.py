"""Every task, solved from its tokens alone by a program that reads them one by one."""

import dataclasses
import json
import re

import numpy as np
import pytest

from bmojo.data.synthetic import EVALUATION, MAD_HARDER, NO_ANSWER, TASKS, make_task, task_record
from bmojo.data.synthetic.task import distinct, previous, text_bytes
from bmojo.errors import DataError

SMALL = {
    "mqar": {"length": 64, "pairs": 6, "keys": 12, "values": 9},
    "in_context_recall": {"length": 48},
    "noisy_recall": {"length": 48, "noise": 0.4},
    "fuzzy_recall": {"length": 96, "symbols": 8},
    "memorization": {"symbols": 24},
    "compression": {"length": 12},
    "selective_copying": {"length": 48, "copies": 9},
    "needle": {"length": 160, "digits": 3},
    "phone_book": {"length": 100, "digits": 3, "first_names": 5, "last_names": 4},
    "lookup": {"length": 300, "facts": 3, "digits": 3, "form": "documents"},
    "induction": {"length": 33},
    "drift": {"length": 128, "keys": 4, "hazard": 0.4},
    "universal": {"length": 64},
    "markov_tree": {"length": 64, "depth": 4},
    "linear_gaussian": {"length": 24},
}
LOOKUPS = {
    "needle": rb"\nThe number of (\w{6}) is #(\d+)\.\n",
    "phone_book": rb"\n(\w{6}) (\w{6}) has number #(\d+)\.\n",
    "documents": rb"\nIn (\w{6}), the number of (\w{6}) is #(\d+)\.\n",
}
NUMBERS = [0, 7, EVALUATION + 3]


def recall_solver(task, row):
    """Pairs of tokens: a key seen before, outside noise, has the value that it had."""
    seen, answers = {}, {}
    for i in range(0, task.length, 2):
        key, value = row[i], row[i + 1]
        if key < (task.symbols - task.noise_symbols) // 2:
            if key in seen:
                answers[i] = (seen[key][0], i - seen[key][1])
            seen[key] = (value, i + 1)
    return answers


def mqar_solver(task, row):
    seen, answers, i = {}, {}, 0
    while i < task.length:
        if row[i] < task.keys and row[i] not in seen:
            seen[row[i]] = (row[i + 1], i + 1)
            i += 1
        elif row[i] < task.keys:
            answers[i] = (seen[row[i]][0], i - seen[row[i]][1])
        i += 1
    return answers


def fuzzy_solver(task, row):
    """Runs of key tokens and of value tokens by turns; a key seen before asks for all tokens of its value."""
    pad, keys = task.symbols - 1, (task.symbols - 1) // 2
    seen, answers, i = {}, {}, 0
    while row[i] == pad:
        i += 1
    while i < task.length:
        first = i
        while row[i] < keys:
            i += 1
        key, value = tuple(row[first:i]), i
        while i < task.length and row[i] >= keys:
            i += 1
        for j in range(value, i if key in seen else value):
            answers[j - 1] = (seen[key][0][j - value], j - 1 - (seen[key][1] + j - value))
        seen[key] = (row[value:i], value)
        assert 1 <= len(key) <= task.key_tokens
        assert 1 <= i - value <= task.value_tokens
    return answers


def memorization_solver(task, row):
    return {i: (int(task.values()[row[i - 1]]), 1) for i in range(1, task.length, 2)}


def copying_solver(task, row):
    end = list(row).index(task.symbols - 1)
    to_copy = [(token, i) for i, token in enumerate(row[:end]) if token < task.symbols - 2]
    return {end + 1 + j: (token, end + 1 + j - i) for j, (token, i) in enumerate(to_copy)}


def needle_solver(task, row):
    text = bytes(row.tolist())
    question = text[text.rindex(b"\nThe number of ") : text.rindex(b"#") + 1]
    fact = text.index(question) + len(question)
    asked = len(text) - task.digits
    assert text[: asked + 1].endswith(question)
    return {asked + i: (text[fact + i], asked - fact) for i in range(task.digits)}


def lookup_solver(task, row):
    sentence = LOOKUPS[task.form]
    stated, answers = {}, {}
    for found in re.finditer(sentence, bytes(row.tolist())):
        *names, number = found.groups()
        if tuple(names) in stated:
            place, value = stated.pop(tuple(names))
            at = found.start(len(names) + 1)
            assert value == number
            first = found.end(len(names)) - at if task.early else 0
            answers |= {at - 1 + i: (number[max(i, 0)], at - 1 + min(i, 0) - place) for i in range(first, task.digits)}
        else:
            stated[tuple(names)] = found.start(len(names) + 1), number
    assert not stated
    return answers


def phone_book_solver(task, row):
    entry, end = task.digits + 2, list(row).index(task.vocab_size - 2)
    start = list(row < task.vocab_size - 2).index(True)
    book = {(row[i], row[i + 1]): i for i in range(start, end, entry)}
    assert len(book) == task.entries  # no name twice
    asked = {}
    for i in range(end + 1, task.length, entry):
        fact = book[row[i], row[i + 1]]
        asked |= {i + 1 + j: (row[fact + 2 + j], i + 1 - fact - 2) for j in range(task.digits)}
    return asked


def induction_solver(task, row):
    place = list(row).index(task.symbols - 1)
    return {task.length - 1: (row[place + 1], task.length - 1 - place - 1)}


def drift_solver(task, row):
    shown, answers = {}, {}
    for i in range(0, task.length, 2):
        if row[i + 1] == task.vocab_size - 1:
            answers[i] = (shown[row[i]][0], i - shown[row[i]][1])
        else:
            shown[row[i]] = (row[i + 1], i + 1)
    return answers


SOLVERS = {
    "mqar": mqar_solver,
    "in_context_recall": recall_solver,
    "noisy_recall": recall_solver,
    "fuzzy_recall": fuzzy_solver,
    "memorization": memorization_solver,
    "selective_copying": copying_solver,
    "needle": needle_solver,
    "phone_book": phone_book_solver,
    "lookup": lookup_solver,
    "induction": induction_solver,
    "drift": drift_solver,
}


def check_answers(task, solver, number, rows=20):
    """Every question is answered from the tokens alone, no other place is labelled, and facts are as far as told."""
    batch = task.batch(number, rows)
    assert {array.shape for array in batch.values()} == {(rows, task.length)}
    for row, labels, distance in zip(batch["tokens"], batch["labels"], batch["distance"], strict=True):
        asked = (labels != NO_ANSWER).nonzero()[0]
        assert {int(i): (labels[i], distance[i]) for i in asked} == solver(task, row)
        assert len(asked)
        assert (distance[asked] > 0).all()
        assert (np.delete(distance, asked) == 0).all()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", SOLVERS)
def test_answers_follow_from_the_tokens(name, number):
    check_answers(make_task(name, **SMALL[name]), SOLVERS[name], number)


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_settings_and_number_alone(name):
    task = make_task(name, **SMALL[name])
    batch = task.batch(5, 30)
    again = make_task(**json.loads(json.dumps(task_record(task)))).batch(5, 30)
    assert batch.keys() == again.keys()
    for array in batch:
        assert batch[array].dtype == np.int64
        assert (batch[array] == again[array]).all()
    assert batch["tokens"].min() >= 0
    assert batch["tokens"].max() < task.vocab_size
    assert batch["labels"].max() < task.vocab_size
    assert 0 < task.chance <= 0.5
    others = (task.batch(6, 30), task.batch(EVALUATION + 5, 30), dataclasses.replace(task, seed=1).batch(5, 30))
    assert all((other["tokens"] != batch["tokens"]).any(1).mean() > 0.9 for other in others)


@pytest.mark.parametrize(("name", "setting"), [(name, s) for name, change in MAD_HARDER.items() for s in change])
def test_harder_settings(name, setting):
    for value in MAD_HARDER[name][setting]:
        task = make_task(name, **{setting: value})
        if name in SOLVERS:
            check_answers(task, SOLVERS[name], 0, rows=2)
        else:
            assert task.batch(0, 2)["tokens"].shape == (2, task.length)


def test_baselines_of_mad():
    sizes = {name: (make_task(name).length, make_task(name).symbols) for name in MAD_HARDER}
    assert sizes == {
        "in_context_recall": (128, 16),
        "noisy_recall": (128, 32),
        "fuzzy_recall": (128, 16),
        "memorization": (32, 256),
        "compression": (32, 16),
        "selective_copying": (256, 16),
    }


def test_noise_has_its_share_and_its_symbols():
    task = make_task("noisy_recall", length=512)
    pairs = task.batch(0, 200)["tokens"].reshape(-1, 2)
    noise = pairs >= 16
    assert (noise[:, 0] == noise[:, 1]).all()
    assert abs(noise[:, 0].mean() - 0.2) < 0.01
    assert len(np.unique(pairs[noise])) == 16
    clean = make_task("noisy_recall", noise=0.0, noise_symbols=0).batch(0, 9)
    assert (clean["labels"] != NO_ANSWER).sum() > 9 * 40


def test_recall_always_has_a_question_even_in_strong_noise():
    task = make_task("noisy_recall", length=8, noise=0.99)
    assert ((task.batch(0, 500)["labels"] != NO_ANSWER).sum(1) > 0).all()


def test_fuzzy_evaluation_has_longest_keys_only():
    task = make_task("fuzzy_recall")
    runs = {"train": set(), "evaluation": set()}
    for kind, number in (("train", 0), ("evaluation", EVALUATION)):
        for row in task.batch(number, 20)["tokens"]:
            text = "".join("k" if token < 7 else "v" for token in row if token < 15)
            runs[kind] |= {len(run) for run in text.split("v") if run}
            values = {len(run) for run in text.split("k") if run}
            assert values <= {1, 2, 3}
    assert runs == {"train": {1, 2, 3}, "evaluation": {3}}


def test_fuzzy_runs_hold_no_token_twice():
    task = make_task("fuzzy_recall", symbols=9, key_tokens=4, value_tokens=4)
    for row in task.batch(0, 20)["tokens"]:
        row = [int(token) for token in row if token < 8]
        kinds = np.flatnonzero(np.diff(np.array(row) < 4)) + 1
        assert all(len(set(run)) == len(run) for run in np.split(row, kinds))


def test_memorization_has_one_map_for_all_batches():
    task = make_task("memorization")
    assert len(set(task.values())) == 127
    assert (task.values() != dataclasses.replace(task, seed=1).values()).any()
    met = {}
    for number in (0, 1, EVALUATION):
        batch = task.batch(number, 50)
        for key, value in zip(batch["tokens"][:, ::2].ravel(), batch["labels"][:, 1::2].ravel(), strict=True):
            assert met.setdefault(key, value) == value
    assert len(met) == 127


def test_compression_asks_for_every_position():
    task = make_task("compression")
    batch = task.batch(0, 9)
    assert (batch["tokens"][:, -1] == 15).all()
    assert (batch["labels"] == batch["tokens"][:, :-1]).all()
    assert (batch["labels"] < 15).all()
    assert (batch["decode"] == 16 + np.arange(31)).all()
    assert (batch["distance"] == 31 - np.arange(31)).all()
    assert task.vocab_size == 16 + 31


def test_copies_are_spread_and_full():
    batch = make_task("selective_copying").batch(0, 300)
    prefix = batch["tokens"][:, :-17]
    assert ((prefix < 14).sum(1) == 16).all()
    share = (prefix < 14).mean(0)
    assert abs(share[:112].mean() - share[112:-1].mean()) < 0.01


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_lie_at_their_depth(depth):
    task = make_task("needle", length=400, depth=depth)
    for row in task.batch(0, 5)["tokens"]:
        text = bytes(row.tolist())
        before = text.index(b"\nThe number of ")
        haystack = 400 - 2 * len(b"\nThe number of bababa is #12345") - len(b".\n") + 1
        assert before == round(depth * haystack)


def test_needles_lie_anywhere_in_text_that_stays_whole():
    task = make_task("needle", length=400)
    plain, places = dataclasses.replace(task, depth=1.0), []
    for row, other in zip(task.batch(0, 50)["tokens"], plain.batch(0, 50)["tokens"], strict=True):
        text, same = bytes(row.tolist()), bytes(other.tolist())
        start = text.index(b"\nThe number of ")
        places.append(start)
        needle = text[start : text.index(b".\n", start) + 2]
        assert text.replace(needle, b"", 1) == same.replace(needle, b"", 1)
    assert min(places) < 60
    assert max(places) > 250


def test_needles_in_another_tokenizer():
    def encode(text):  # two characters a token
        return [ord(text[i]) % 128 * 128 + ord(text[i + 1 : i + 2] or " ") % 128 for i in range(0, len(text), 2)]

    task = make_task("needle", length=200, text_vocab=128 * 128, encode=encode)
    assert "encode" not in task_record(task)
    batch = task.batch(0, 3)
    for row, labels, distance in zip(batch["tokens"], batch["labels"], batch["distance"], strict=True):
        asked = (labels != NO_ANSWER).nonzero()[0]
        assert list(asked) == [197, 198, 199]
        assert (row[asked - distance[asked] + np.arange(3)] == labels[asked])[0]
        fact = asked[0] - distance[asked][0]
        assert (row[fact : fact + 3] == labels[asked]).all()
    with pytest.raises(DataError, match="length must be at least"):
        make_task("needle", length=20, text_vocab=128 * 128, encode=encode)


@pytest.mark.parametrize("form", LOOKUPS)
def test_lookups_in_each_form(form):
    task = make_task("lookup", length=1200, facts=12, form=form)
    check_answers(task, lookup_solver, 0, rows=5)
    check_answers(dataclasses.replace(task, early=True), lookup_solver, 0, rows=5)
    for row in task.batch(0, 5)["tokens"]:
        names = list(zip(*re.findall(LOOKUPS[form], bytes(row.tolist())), strict=True))[:-1]
        assert len(set(zip(*names, strict=True))) == 12  # each named by all its names together
        assert all(len(set(part)) < 12 for part in names) == (form != "needle")  # and by no single one of two


@pytest.mark.parametrize("form", LOOKUPS)
def test_a_haystack_and_all_questions_about_it(form):
    task = make_task("lookup", length=20_000, facts=40, form=form)
    asked = task.haystack(0)
    text = bytes(asked["haystack"].tolist())
    stated = {tuple(found[:-1]): found[-1] for found in re.findall(LOOKUPS[form], text)}
    assert len(text) == 20_000
    assert len(stated) == len(asked["tokens"]) == 40
    for later, labels, distance in zip(asked["tokens"], asked["labels"], asked["distance"], strict=True):
        at = (labels != NO_ANSWER).nonzero()[0]
        ((*names, number),) = re.findall(LOOKUPS[form], bytes(later.tolist()))
        assert stated[tuple(names)] == number == bytes(labels[at].tolist()) == bytes(later[at + 1].tolist())
        assert (asked["haystack"][20_000 + at - distance[at]] == labels[at]).all()
    assert (task.haystack(1)["haystack"] != asked["haystack"]).any()


def test_a_haystack_is_text_that_training_never_shows():
    plain = re.sub(
        LOOKUPS["needle"], b"", bytes(make_task("lookup", length=3000, facts=1).haystack(3)["haystack"].tolist())
    )
    assert len(plain) > 2900
    assert plain not in bytes(text_bytes())
    with pytest.raises(DataError, match="length must be at most that of the text there is"):
        make_task("lookup", length=2**26).haystack(0)


def test_names_recur_in_other_names():
    task = make_task("phone_book", length=200, first_names=8, last_names=8)
    for row in task.batch(0, 5)["tokens"]:
        start = list(row < task.vocab_size - 2).index(True)
        book = row[start : start + 6 * task.entries].reshape(-1, 6)
        assert len({tuple(name) for name in book[:, :2]}) == task.entries > 20
        assert (book[:, 0] < 8).all()
        assert ((book[:, 1] >= 8) & (book[:, 1] < 16)).all()
        assert ((book[:, 2:] >= 16) & (book[:, 2:] < 26)).all()


@pytest.mark.parametrize("length", [4, 5, 16, 2**16])
def test_induction_at_any_length(length):
    task = make_task("induction", length=length)
    batch = task.batch(0, 3)
    for row, distance in zip(batch["tokens"], batch["distance"], strict=True):
        assert list((row == 15).nonzero()[0]) == [length - 2 - distance[-1], length - 1]
        assert distance[-1] > length / 2 - 2


def test_the_source_drifts_as_told():
    task = make_task("drift", length=4096, hazard=0.3, asked=0.25)
    batch = task.batch(0, 20)
    changes = showings = repeats = questions = 0
    for row, labels, stale in zip(batch["tokens"], batch["labels"], batch["stale"], strict=True):
        current, old = {}, {}
        for i in range(0, 4096, 2):
            key, value = row[i], row[i + 1]
            repeats += key in current
            if value == task.vocab_size - 1:
                questions += 1
                assert labels[i] == current[key] != stale[i]
                assert stale[i] == old.get(key, NO_ANSWER)
                continue
            assert labels[i] == stale[i] == NO_ANSWER
            if key in current:
                showings += 1
                if value != current[key]:
                    changes += 1
                    old[key] = current[key]
            current[key] = value
        assert (stale[1::2] == NO_ANSWER).all()
    assert abs(changes / showings - 0.3) < 0.01
    assert abs(questions / repeats - 0.25) < 0.01


def test_drift_at_its_extremes():
    fixed = make_task("drift", hazard=0.0).batch(0, 5)
    assert (fixed["stale"] == NO_ANSWER).all()
    assert (fixed["labels"] != NO_ANSWER).any()
    assert (make_task("drift", asked=0.0).batch(0, 5)["labels"] == NO_ANSWER).all()
    wild = make_task("drift", hazard=1.0, values=2, length=64)
    check_answers(wild, drift_solver, 0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("in_context_recall", {"length": 63}, "length must be even, 4 or more, got 63"),
        ("in_context_recall", {"noise": 0.5}, "noise_symbols must be at least 1 for noise 0.5, got 0"),
        ("noisy_recall", {"noise": 1.0}, "noise must be at least 0 and below 1, got 1.0"),
        ("noisy_recall", {"symbols": 17}, r"symbols must be at least noise_symbols \+ 2 \(18\), got 17"),
        ("fuzzy_recall", {"length": 11}, r"length must be at least 2 \* \(key_tokens \+ value_tokens\) \(12\), got 11"),
        ("fuzzy_recall", {"symbols": 6}, "key_tokens must be from 1 to 2 for 6 symbols, got 3"),
        ("fuzzy_recall", {"value_tokens": 0}, "value_tokens must be from 1 to 4 for 16 symbols, got 0"),
        ("fuzzy_recall", {"symbols": 2}, "symbols must be at least 3, got 2"),
        ("memorization", {"length": 3}, "length must be even, 2 or more, got 3"),
        ("memorization", {"symbols": 2}, "symbols must be at least 3, got 2"),
        ("compression", {"length": 1}, "length must be at least 2, got 1"),
        ("compression", {"symbols": 1}, "symbols must be at least 2, got 1"),
        ("selective_copying", {"length": 32}, r"length must be at least 2 \* copies \+ 1 \(33\), got 32"),
        ("selective_copying", {"copies": 0}, "copies must be at least 1, got 0"),
        ("selective_copying", {"symbols": 2}, "symbols must be at least 3, got 2"),
        ("needle", {"depth": 1.5}, "depth must be None or from 0 to 1, got 1.5"),
        ("needle", {"length": 30}, "length must be at least 63 for the needle and its question, got 30"),
        ("needle", {"text_vocab": 100}, "text_vocab must be at least 256, got 100"),
        ("needle", {"digits": 0}, "digits must be at least 1, got 0"),
        ("lookup", {"form": "needles"}, "unknown form 'needles'; did you mean 'needle'"),
        ("lookup", {"facts": 0}, "facts must be at least 1, got 0"),
        ("lookup", {"length": 100}, "length must be at least 256 for 4 facts and as many questions, got 100"),
        ("phone_book", {"length": 48}, r"length must be at least 2 \* lookups \* \(digits \+ 2\) \+ 1 \(49\), got 48"),
        ("phone_book", {"first_names": 1}, r"first_names \* last_names must be at least the 81 entries .* got 64"),
        ("phone_book", {"digits": 0}, "digits must be at least 1, got 0"),
        ("induction", {"length": 3}, "length must be at least 4, got 3"),
        ("induction", {"symbols": 1}, "symbols must be at least 2, got 1"),
        ("drift", {"length": 7}, "length must be even, 4 or more, got 7"),
        ("drift", {"keys": 0}, "keys must be at least 1, got 0"),
        ("drift", {"values": 1}, "values must be at least 2, got 1"),
        ("drift", {"hazard": 1.5}, "hazard must be from 0 to 1, got 1.5"),
        ("drift", {"asked": -0.5}, "asked must be from 0 to 1, got -0.5"),
        ("drift", {"keys": "4"}, "keys must be int, got '4'"),
        ("drift", {"keys": True}, "keys must be int, got True"),
        ("drift", {"hazard": None}, "hazard must be float, got None"),
        ("needle", {"depth": "half"}, "depth must be float or None, got 'half'"),
        ("induction", {"seed": -1}, "seed must not be negative, got -1"),
        ("induction", {"lenght": 8}, "induction has no setting 'lenght'; did you mean 'length'"),
        ("mqar", {"length": 8}, "mqar needs the setting 'pairs'"),
        ("mqra", {}, "unknown task 'mqra'; did you mean 'mqar'"),
    ],
)
def test_refuses(name, fields, message):
    with pytest.raises(DataError, match=message):
        make_task(name, **fields)


def test_a_haystack_longer_than_the_text():
    task = make_task("needle", length=2**26)
    with pytest.raises(DataError, match="length must be at most that of the text there is"):
        task.batch(0, 1)


@pytest.mark.parametrize(("count", "size"), [(3, 4), (2, 5)])
def test_distinct_draws_are_uniform(count, size):
    draws = distinct(np.random.default_rng(0), 24_000, count, size)
    choices, counts = np.unique(draws, axis=0, return_counts=True)
    number = np.prod(np.arange(size, size - count, -1))
    assert len(choices) == number
    assert all(len(set(choice)) == count for choice in choices.tolist())
    expected = 24_000 / number
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < number - 1 + 4 * np.sqrt(2 * (number - 1))


def test_previous():
    assert previous(np.array([[3, 1, 3, 3, 1], [0, 0, 2, 0, 5]])).tolist() == [[-1, -1, 0, 2, 1], [-1, 0, -1, 1, -1]]
