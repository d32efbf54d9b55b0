"""A needle in a haystack of real text: a sentence with a number somewhere in it, asked for again at the end.

    ... text ... The number of bakidu is #40713. ... text ... The number of bakidu is #4071
                                                        answers at the last `#`, 4, 0, 7, 1: 4 0 7 1 3

After Kamradt 2023 (github.com/gkamradt/LLMTest_NeedleInAHaystack), with a needle that no text holds and exact answers.
The haystack is the source code of Python's standard library: on one Python version, the same batch everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bmojo.data.synthetic.task import NO_RECORD, Batch, Encode, Task, excerpts, unasked

_CONSONANTS, _VOWELS, _SYLLABLES = "bdfgklmnprstvz", "aeiou", 3


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """A number of `digits` digits, hidden at `depth` of the text (0: its start, 1: its end; None: anywhere).

    encode: text to token ids below `text_vocab`; None: its UTF-8 bytes. Not part of the task's record.
    """

    length: int = 1024
    depth: float | None = None
    digits: int = 5
    text_vocab: int = 256
    encode: Encode | None = field(default=None, repr=False, compare=False, metadata=NO_RECORD)

    def check(self) -> None:
        self.require(self.depth is None or 0 <= self.depth <= 1, f"depth must be None or from 0 to 1, got {self.depth}")
        self.require(self.digits >= 1, f"digits must be at least 1, got {self.digits}")
        least = 256 if self.encode is None else 1
        self.require(self.text_vocab >= least, f"text_vocab must be at least {least}, got {self.text_vocab}")
        self._room(*self._sentence("ba" * _SYLLABLES, "0" * self.digits))

    @property
    def vocab_size(self) -> int:
        return self.text_vocab

    @property
    def chance(self) -> float:
        """That of guessing one digit, where every digit is a token."""
        return 1 / 10

    def batch(self, number: int, rows: int) -> Batch:
        draw = self.generator(number)
        consonants = draw.integers(len(_CONSONANTS), size=(rows, _SYLLABLES))
        vowels = draw.integers(len(_VOWELS), size=(rows, _SYLLABLES))
        digits = draw.integers(10, size=(rows, self.digits))
        depth = draw.random(rows)  # drawn in any case, so that all depths are asked of the same texts
        if self.depth is not None:
            depth[:] = self.depth
        batch = unasked(excerpts(draw, rows, self.length, self.encode))
        for row, text in enumerate(batch["tokens"]):
            word = "".join(_CONSONANTS[c] + _VOWELS[v] for c, v in zip(consonants[row], vowels[row], strict=True))
            question, answer, stop = self._sentence(word, "".join(map(str, digits[row])))
            room = self._room(question, answer, stop)
            place = round(depth[row] * room)
            needle = question + answer + stop
            fact = place + len(question)
            text[place + len(needle) : room + len(needle)] = text[place:room].copy()
            text[place : place + len(needle)] = needle
            text[room + len(needle) :] = question + answer[:-1]
            asked = slice(self.length - len(answer), self.length)
            batch["labels"][row, asked] = answer
            batch["distance"][row, asked] = self.length - len(answer) - fact
        return batch

    def _sentence(self, word: str, number: str) -> tuple[list[int], list[int], list[int]]:
        """The question, its answer, and what ends the needle."""
        question, answer, stop = (
            list(text.encode()) if self.encode is None else list(self.encode(text))
            for text in (f"\nThe number of {word} is #", number, ".\n")
        )
        return question, answer, stop

    def _room(self, question: list[int], answer: list[int], stop: list[int]) -> int:
        """How many tokens of the haystack fit."""
        used = 2 * len(question + answer) + len(stop) - 1
        self.require(
            self.length >= used, f"length must be at least {used} for the needle and its question, got {self.length}"
        )
        return self.length - used
