"""Facts in real text, each stated and later asked for: a sentence that comes again is a question.

    ... text ... The number of bakidu is #4071. ... text ... The number of bakidu is #4071. ... text ...
                                              answers at the second `#`, 4, 0, 7: 4 0 7 1

Three forms of a fact: of a name alone ("needle"), of a first and a last name ("phone_book"), and of a name in a named
document ("documents"); in the last two neither name is enough, as both recur in other facts with other numbers.
For training there are many questions a row; for evaluation, `haystack` gives one long text and all that can be asked.
With `early`, a question asks for the first digit as soon as its names are complete, and at every token from there on:
so those tokens learn to look for the fact that have to ask a store for it in time.
The needle is that of `bmojo.data.synthetic.needle`, of which there are many here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bmojo.data.documents import read_documents
from bmojo.data.synthetic.task import Batch, Task, ask, distinct, excerpts, text_bytes, unasked
from bmojo.errors import nearest

FORMS = {
    "needle": "\nThe number of {} is #",
    "phone_book": "\n{} {} has number #",
    "documents": "\nIn {}, the number of {} is #",
}
_STOP = ".\n"
LATER = 64  # bytes behind a haystack among which a question stands, so that it comes at any place of a chunk or stride
_CONSONANTS, _VOWELS, _SYLLABLES = b"bdfgklmnprstvz", b"aeiou", 3
_NAMES = (len(_CONSONANTS) * len(_VOWELS)) ** _SYLLABLES


@dataclass(frozen=True, kw_only=True)
class Lookup(Task):
    """`facts` facts of `digits` digits, each asked once, in `length` bytes of text; `form`: one of FORMS, or a
    sentence with {} for a name, or for two."""

    length: int = 512
    facts: int = 4
    digits: int = 4
    form: str = "needle"
    early: bool = False

    def check(self) -> None:
        self.require(
            self._template.count("{}") in (1, 2),
            f"unknown form {self.form!r}; {nearest(self.form, FORMS)}; or a sentence with {{}} for one or two names",
        )
        for name in ("facts", "digits"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        least = 2 * self.facts * self._sentence
        self.require(
            self.length >= least,
            f"length must be at least {least} for {self.facts} facts and as many questions, got {self.length}; "
            "use fewer facts",
        )
        self.require(self.facts <= _NAMES // 2, f"facts must be at most {_NAMES // 2}, got {self.facts}")

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def chance(self) -> float:
        """That of guessing one digit."""
        return 1 / 10

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        sentences = self._sentences(draw, rows)
        order = draw.permuted(np.tile(np.arange(2 * self.facts), (rows, 1)), axis=1).reshape(rows, self.facts, 2)
        order.sort(2)  # of each fact the places, among all sentences, of its statement and of its question
        told = np.empty((rows, 2 * self.facts), np.int64)
        np.put_along_axis(told, order.reshape(rows, -1), np.repeat(np.arange(self.facts), 2)[None], 1)
        text = excerpts(draw, rows, self.length - told.shape[1] * self._sentence)
        tokens, start = _spread(draw, np.take_along_axis(sentences, told[:, :, None], 1), text)
        batch = unasked(tokens)
        stated, asked = (np.take_along_axis(start, order[:, :, i], 1)[:, :, None] for i in (0, 1))
        digit = self._sentence - len(_STOP) - self.digits + np.arange(self.digits)
        at = digit - 1
        if self.early:
            ahead = np.arange(-len(self._template.rpartition("}")[2]), 0)
            at, digit = np.append(at[0] + ahead, at), np.append(np.full_like(ahead, digit[0]), digit)
        answers = sentences[:, :, digit].reshape(rows, -1)
        ask(batch, (asked + at).reshape(rows, -1), answers, (stated + digit).reshape(rows, -1))
        return batch

    def haystack(self, number: int) -> Batch:
        """`haystack` [length], text that `batch` never shows with all facts stated, and a row for each question about
        it: `tokens`, `labels` and `distance` as in a batch, [facts, n], to be read after it. The question stands
        somewhere in the LATER bytes that follow."""
        draw = self.generator(number)
        sentences = self._sentences(draw, 1)
        text = _kept(draw, self.length + LATER - sentences[0].size)
        tokens, stated = _spread(draw, sentences, text[None, :-LATER])
        rows, asked = _spread(draw, sentences[0][:, None], np.tile(text[-LATER:], (self.facts, 1)))
        batch = unasked(rows)
        digit = self._sentence - len(_STOP) - self.digits + np.arange(self.digits)
        ask(batch, asked + digit - 1, sentences[0][:, digit], stated[0][:, None] + digit - self.length)
        return batch | {"haystack": tokens[0]}

    @property
    def _sentence(self) -> int:
        """Its length in bytes."""
        names = self._template.count("{}")
        return len(self._template) + names * (2 * _SYLLABLES - 2) + self.digits + len(_STOP)

    @property
    def _template(self) -> str:
        return FORMS.get(self.form, self.form)

    def _sentences(self, draw: np.random.Generator, rows: int) -> np.ndarray:
        """[rows, facts, bytes] int64."""
        parts = self._template.split("{}")
        names = len(parts) - 1
        pool = math.isqrt(2 * self.facts) + 1  # each of two names recurs
        chosen = distinct(draw, rows, self.facts if names == 1 else names * pool, _NAMES)
        keys = chosen[None]
        if names > 1:
            pair = np.stack(np.divmod(distinct(draw, rows, self.facts, pool**2), pool))
            keys = np.stack([np.take_along_axis(chosen, i * pool + pair[i], 1) for i in range(names)])
        digits = draw.integers(ord("0"), ord("9") + 1, (rows, self.facts, self.digits))

        def fixed(text: str) -> np.ndarray:
            return np.broadcast_to(np.frombuffer(text.encode(), np.uint8), (rows, self.facts, len(text)))

        pieces = [fixed(parts[0])]
        for key, text in zip(keys, parts[1:], strict=True):
            pieces += [_spell(key), fixed(text)]
        return np.concatenate([*pieces, digits, fixed(_STOP)], 2).astype(np.int64)


def _spread(draw: np.random.Generator, sentences: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sentences [rows, n, bytes] at random places of text [rows, m], in this order: [rows, m + n * bytes], and their
    starts [rows, n]."""
    rows, count, size = sentences.shape
    start = np.sort(draw.integers(text.shape[1] + 1, size=(rows, count)), axis=1) + size * np.arange(count)
    tokens = np.full((rows, text.shape[1] + count * size), -1)
    inside = (start[:, :, None] + np.arange(size)).reshape(rows, -1)
    np.put_along_axis(tokens, inside, sentences.reshape(rows, -1), 1)
    tokens[tokens < 0] = text.ravel()
    return tokens, start


def _spell(names: np.ndarray) -> np.ndarray:
    """[..., letters] bytes of the names of these numbers."""
    letters = []
    for _ in range(_SYLLABLES):
        names, syllable = np.divmod(names, len(_CONSONANTS) * len(_VOWELS))
        consonant, vowel = np.divmod(syllable, len(_VOWELS))
        letters += [np.frombuffer(_CONSONANTS, np.uint8)[consonant], np.frombuffer(_VOWELS, np.uint8)[vowel]]
    return np.stack(letters, -1)


def _kept(draw: np.random.Generator, length: int) -> np.ndarray:
    """[length]: consecutive text from a random place behind what `excerpts` draws from."""
    text = _rest()
    Task.require(length <= len(text), f"length must be at most that of the text there is, {len(text):,}, got {length}")
    start = draw.integers(len(text) - length + 1)
    return text[start : start + length]


@lru_cache(maxsize=1)
def _rest() -> np.ndarray:
    text = "".join(document.text for document in read_documents("stdlib")).encode()
    return np.frombuffer(text, np.uint8)[len(text_bytes()) :]
