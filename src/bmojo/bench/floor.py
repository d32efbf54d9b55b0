"""How fast it could be: counted work over the rates that the machine reaches in the same run.

Counted are the FLOPs of the matrix products (2 a multiply-add; `bmojo.nn.count`) and the bytes that must move whatever
the form: of a model its weights, the input and the output of each layer and the logits (written and read), each once;
of an op its arguments and results. With the backward pass both count three times. Of a decoded token: its FLOPs at that
context, the weights and the state, once. The floor is FLOPs over the rate of a float32 product of 2048 x 2048 matrices
(the dtype of the run, on a GPU) plus bytes over the bandwidth of a copy (reading and writing counted), as if nothing
overlapped and all of it came from main memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.nn.count import costs, layer_flops, mixer_parameters, parameters

MATRIX = 2048
COPIED = 2**26  # numbers: 256 MiB of float32
WIDTH = 4  # bytes of a number
BACKWARD = 3  # forward and backward over forward


class Work(NamedTuple):
    flops: int
    bytes: int


class Rates(NamedTuple):
    """What the machine reaches: FLOP/s of a large matrix product, bytes/s of a copy."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The floor."""
        return work.flops / self.flops + work.bytes / self.bytes


def measure_rates(timer: Callable[[Callable[[], Any]], float], device: str, dtype: torch.dtype) -> Rates:
    """Of the fastest of several runs: a floor is what can be reached, whatever else the machine does now."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    product, source = torch.empty_like(a), torch.zeros(COPIED, device=device)
    copy = torch.empty_like(source)

    def fastest(run: Callable[[], Any]) -> float:
        return min(timer(run) for _ in range(7))

    return Rates(
        flops=2 * MATRIX**3 / fastest(lambda: torch.mm(a, b, out=product)),
        bytes=2 * source.nbytes / fastest(lambda: copy.copy_(source)),
    )


def model_work(config: ModelConfig, batch: int, time: int, *, backward: bool) -> Work:
    """Of a call of the whole model on [batch, time] tokens."""
    flops = 2 * config.hidden_size * config.vocab_size * time + sum(
        _sequence_flops(config, kind, time) for kind in config.kinds
    )
    tokens = batch * time
    numbers = parameters(config) + 2 * tokens * (config.num_layers * config.hidden_size + config.vocab_size)
    return _passes(batch * flops, WIDTH * numbers, backward)


def layer_work(config: ModelConfig, batch: int, time: int, *, backward: bool) -> Work:
    """Of a call of the mixer of the first layer."""
    bare = config.replace(intermediate_size=0)
    numbers = mixer_parameters(config, config.kinds[0]) + 2 * batch * time * config.hidden_size
    return _passes(batch * _sequence_flops(bare, config.kinds[0], time), WIDTH * numbers, backward)


def op_work(multiply_adds: float, *tensors: Tensor, backward: bool) -> Work:
    """Of an op with these arguments and results."""
    return _passes(round(2 * multiply_adds), sum(z.nbytes for z in tensors), backward)


def decode_work(config: ModelConfig, context: int, tokens: int, batch: int) -> Work:
    """Of so many tokens of each row, one at a time, after `context`."""
    total = costs(config, [context])[1]
    state = batch * total.state_bytes[0]
    return Work(tokens * batch * total.flops[0], tokens * (WIDTH * total.parameters + state))


def _passes(flops: int, bytes_: int, backward: bool) -> Work:
    times = BACKWARD if backward else 1
    return Work(times * flops, times * bytes_)


@functools.lru_cache(maxsize=1024)
def _sequence_flops(config: ModelConfig, kind: str, time: int) -> int:
    return sum(layer_flops(config, kind, context) for context in range(time))
