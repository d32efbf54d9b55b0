"""What one more token costs after a context: time, and bytes of state."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from bmojo.memory.state import MemoryState
from bmojo.nn.decoder import Decoder
from bmojo.nn.model import BMojoLM

WARM_UP = 3


@torch.inference_mode()
def decode_cost(
    model: BMojoLM, contexts: list[int], *, tokens_per_context: int = 16, prefill_segment: int = 512, seed: int = 0
) -> list[dict[str, Any]]:
    """`context`, `ms_per_token`, `state_bytes` at each context (tokens, ascending), at batch size 1.

    One stream of random tokens is read in segments; at each context single tokens are decoded on a copy of the state,
    the first 3 untimed. The time is the median of `tokens_per_context` tokens; the bytes are those carried at the
    context.
    """
    contexts = sorted(set(contexts))
    device = model.embed.weight.device
    draw = torch.Generator().manual_seed(seed)
    extra = WARM_UP + tokens_per_context
    stream = torch.randint(model.config.vocab_size, (1, contexts[-1] + extra), generator=draw).to(device)
    costs = []
    state, read = model.empty_state(), 0
    for context in contexts:
        while read < context:
            upto = min(context, read + prefill_segment)
            _, state = model.features(stream[:, read:upto], state)
            read = upto
        seconds = _time_steps(model, stream[:, context : context + extra], state)
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
