"""Generation as a stream of tokens whose state can be saved and gone on from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bmojo.errors import ConfigError, DataError
from bmojo.memory.state import MemoryState
from bmojo.nn.decoder import Decoder
from bmojo.nn.model import BMojoLM

PREFILL_SEGMENT = 512
LAST_TOKEN = "last_token"


class Stream:
    """An iterator of `max_new_tokens` token ids at most; it ends early, without yielding it, at one of `stop_ids`.

    Each token is the most likely one (temperature 0), or drawn from softmax(logits / temperature) cut to the `top_k`
    most likely tokens and then to the fewest that have probability `top_p`. The draw for the token at position p of
    the document depends on (seed, p) alone, so a stream that goes on from a state gives what one would have given.

    `state` has read everything but `last`, the token given last (None: nothing is unread):

        stream = Stream(model, prompt_ids, max_new_tokens=10)
        first = list(stream)
        second = list(Stream(model, [stream.last], state=stream.state, max_new_tokens=10))

    Takes the memory of one state, and of a segment of the prompt; the caller's `state` is left as it is.
    Raises DataError for an empty prompt or ids outside the vocabulary, ConfigError for a setting out of range.
    """

    def __init__(
        self,
        model: BMojoLM,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        state: MemoryState | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        _check_settings(max_new_tokens, temperature, top_p, top_k)
        prompt = _check_prompt(prompt_ids, model.config.vocab_size)
        self.model, self.stop_ids = model, frozenset(stop_ids)
        self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed
        self.last: int | None = None
        self._left = max_new_tokens
        with torch.no_grad():
            state = model.empty_state() if state is None else state
            for part in prompt.to(model.embed.weight.device).split(PREFILL_SEGMENT):
                features, state = model.features(part[None], state)
            self._logits = model.logits(features[0, -1])
        self._position = int(state.position)
        self._decoder = Decoder(model, state)

    @property
    def state(self) -> MemoryState:
        """What the model remembers now: a copy."""
        return self._decoder.state

    def __iter__(self) -> Iterator[int]:
        return self

    @torch.no_grad()
    def __next__(self) -> int:
        if self._left == 0:
            raise StopIteration
        if self.last is not None:
            self._logits = self._decoder(torch.tensor([self.last], device=self._logits.device))[0]
            self._position += 1
        choice = self._choose(self._logits)
        if choice in self.stop_ids:
            self._left, self.last = 0, None
            raise StopIteration
        self._left, self.last = self._left - 1, choice
        return choice

    def save(self, path: str | os.PathLike) -> None:
        """Write the state and the last token, if any, for `load_stream_state`; MemoryState.load reads it too."""
        note = {} if self.last is None else {LAST_TOKEN: self.last}
        dataclasses.replace(self.state, note=note).save(path)

    def _choose(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.double().cpu() / self.temperature
        order = scaled.argsort(descending=True, stable=True)[: self.top_k]
        weights = scaled[order].softmax(0).numpy()
        below = weights.cumsum()
        kept = 1 + int(np.searchsorted(below, self.top_p)) if self.top_p < 1 else len(below)
        below = below[:kept]
        draw = np.random.default_rng((self.seed, self._position)).random() * below[-1]
        return int(order[min(int(np.searchsorted(below, draw, side="right")), len(below) - 1)])


def generate(
    model: BMojoLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    state: MemoryState | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """The token ids of a `Stream`, for those who don't need its state."""
    return Stream(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        state=state,
        stop_ids=stop_ids,
    )


def load_stream_state(path: str | os.PathLike, model: BMojoLM) -> tuple[MemoryState, list[int]]:
    """The state that `Stream.save` (or MemoryState.save) wrote, and the tokens that it has not read: one, or none."""
    state = MemoryState.load(path, model.config, device=str(model.embed.weight.device))
    return state, [state.note[LAST_TOKEN]] if LAST_TOKEN in state.note else []


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, top_k: int | None) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(
            f"temperature must be at least 0 and finite, got {temperature}; 0 takes the most likely token"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {top_k}; leave it out for no limit")


def _check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> Tensor:
    prompt = torch.from_numpy(np.asarray(prompt_ids, dtype=np.int64))
    if prompt.numel() == 0:
        raise DataError("there is nothing to go on from: give a prompt of at least one token")
    if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
        raise DataError(
            f"token ids must lie in 0..{vocab_size - 1}, got {int(prompt.min())}..{int(prompt.max())}; "
            "use the tokenizer that the model was trained with"
        )
    return prompt
