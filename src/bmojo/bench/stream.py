"""What a long stream does to the memory of the process."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bmojo.config import ModelConfig
from bmojo.nn.model import BMojoLM
from bmojo.train.memory import memory_bytes

SEGMENT = 512
SETTLED = 10_000  # tokens after which the memory of the process is looked at
SAMPLES = 50


def stream_growth(config: ModelConfig, tokens: int, device: str) -> dict[str, Any]:
    """`measure` in a new process, where nothing that ran before has left memory behind to be used again."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(measure, config, tokens, device, torch.get_num_threads()).result()


@torch.inference_mode()
def measure(config: ModelConfig, tokens: int, device: str, threads: int) -> dict[str, Any]:
    """Random tokens through a new model, in segments of 512: `samples`, pairs of tokens read and bytes held (by the
    process, or on the GPU); `growth_bytes`, the most held after the first 10,000 tokens beyond what was held then."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = BMojoLM(config).to(device)
    draw, state, read, settled = torch.Generator().manual_seed(0), model.empty_state(), 0, 0
    samples: list[list[int]] = []
    most, started = 0, time.perf_counter()
    every = max(1, tokens // SEGMENT // SAMPLES)
    for segment in range(-(-tokens // SEGMENT)):
        size = min(SEGMENT, tokens - read)
        _, state = model(torch.randint(config.vocab_size, (1, size), generator=draw).to(device), state)
        read += size
        held = memory_bytes() or 0
        if read >= SETTLED:
            settled = settled or held
            most = max(most, held)
        if segment % every == 0 or read == tokens:
            samples.append([read, held])
    return {
        "growth_bytes": most - settled if settled else None,
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "state_bytes": state.nbytes,
        "samples": samples,
    }
