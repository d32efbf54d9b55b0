"""Decoding, one token a row: on a GPU as a CUDA graph over buffers that stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError
from bmojo.memory.state import MemoryState
from bmojo.memory.storage import Storage
from bmojo.nn.model import BMojoLM

WARM_UP = 3  # steps before the capture, in which libraries choose their algorithms and allocate


class Decoder:
    """logits [batch, vocab_size] = decoder(tokens [batch]), reading on from `state`, which is left as it is.

    `static`: the state stays in buffers of its own, which every step writes to, and on a CUDA device the first call
    captures the step as a graph that all calls replay: nothing is launched from Python. Logits are then good until the
    next call, and `model` must keep its weights where they are. None: on a CUDA device, unless a layer keeps the whole
    past, whose cache grows. Raises ConfigError for such a model if `static` is True.

    `state` is a value: it does not change when the decoder reads on. Assigning one goes back, or on to another.
    `storage` goes with it, and is the caller's to put back; it is looked after on the host, so nothing is captured.
    """

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(
        self, model: BMojoLM, state: MemoryState, *, static: bool | None = None, storage: Storage | None = None
    ) -> None:
        on_gpu, bounded = state.position.device.type == "cuda", _bounded(model.config)
        if static and not bounded:
            raise ConfigError(
                "a model with layers that keep the whole past has a state that grows, expected one of constant size; "
                "use static=False or a window"
            )
        if static and storage is not None:
            raise ConfigError("what storage finds is looked after on the host; use static=False with it")
        self.model, self.static = model, on_gpu and bounded and storage is None if static is None else static
        self.storage = storage
        self._state = state.clone()
        self._token = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=state.position.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None  # what the graph writes

    @property
    def state(self) -> MemoryState:
        return self._state.clone()

    @state.setter
    def state(self, state: MemoryState) -> None:
        self._write(state) if self.static else setattr(self, "_state", state.clone())

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self._token.copy_(tokens[:, None])
        if not (self.static and self._token.is_cuda):
            return self._step()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def _step(self) -> Tensor:
        logits, state = self.model(self._token, self._state, donate=True, storage=self.storage)
        if self.static:
            self._write(state)
        else:
            self._state = state
        return logits[:, 0]

    def _write(self, state: MemoryState) -> None:
        """Into the buffers, what is not there already."""
        for buffers, layer in zip(self._state.layers, state.layers, strict=True):
            for name, buffer in buffers.items():
                if layer[name] is not buffer:
                    buffer.copy_(layer[name])

    def _capture(self) -> None:
        before, side = self._state.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        self._write(before)
        self._graph = graph


def _bounded(config: ModelConfig) -> bool:
    return all(kind == "ssm" or config.window_of(kind) is not None for kind in config.kinds)
