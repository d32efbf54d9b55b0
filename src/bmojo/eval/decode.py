"""What one more token costs after a context: time, and bytes of state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from bmojo.memory.state import MemoryState
from bmojo.nn.decoder import Decoder
from bmojo.nn.model import BMojoLM

WARM_UP = 3
SEGMENT = 512


def states_at(
    model: BMojoLM, contexts: list[int], *, segment: int = SEGMENT, seed: int = 0
) -> Iterator[tuple[int, MemoryState]]:
    """Each context (tokens, ascending) and the state after it, at batch size 1: one stream of random tokens, read in
    segments."""
    device = model.embed.weight.device
    draw = torch.Generator().manual_seed(seed)
    stream = torch.randint(model.config.vocab_size, (1, contexts[-1]), generator=draw).to(device)
    state, read = model.empty_state(), 0
    for context in contexts:
        while read < context:
            upto = min(context, read + segment)
            _, state = model.features(stream[:, read:upto], state)
            read = upto
        yield context, state


@torch.inference_mode()
def decode_cost(
    model: BMojoLM, contexts: list[int], *, tokens_per_context: int = 16, prefill_segment: int = SEGMENT, seed: int = 0
) -> list[dict[str, Any]]:
    """`context`, `ms_per_token`, `state_bytes` at each context (tokens), at batch size 1.

    At each context single random tokens are decoded on a copy of the state, the first 3 untimed. The time is the median
    of `tokens_per_context` tokens; the bytes are those carried at the context.
    """
    draw = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(model.config.vocab_size, (1, WARM_UP + tokens_per_context), generator=draw)
    tokens = tokens.to(model.embed.weight.device)
    costs = []
    for context, state in states_at(model, sorted(set(contexts)), segment=prefill_segment, seed=seed):
        seconds = _time_steps(model, tokens, state)
        costs.append({"context": context, "ms_per_token": 1000 * seconds, "state_bytes": state.nbytes})
    return costs


def _time_steps(model: BMojoLM, tokens: torch.Tensor, state: MemoryState) -> float:
    """Median seconds of a step over `tokens` [1, n] after the warm-up."""
    decoder, times = Decoder(model, state), []
    for token in tokens[0].split(1):
        started = time.perf_counter()
        decoder(token).argmax().item()  # waits for the device, as decoding does
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])
