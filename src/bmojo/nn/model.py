"""The language model: embedding, pre-norm blocks of a mixer and an MLP, a norm and a head."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bmojo.config import ModelConfig
from bmojo.errors import CheckpointError, ConfigError
from bmojo.files import write_whole
from bmojo.memory.digest import digest
from bmojo.memory.layout import Layout, make_layout
from bmojo.memory.state import MemoryState, require_fit
from bmojo.memory.step import Step
from bmojo.memory.storage import Storage
from bmojo.nn.init import Embedding, Head, Linear, Output, RMSNorm
from bmojo.nn.mixer import Mixer, Trace
from bmojo.nn.ssm import State
from bmojo.ops.cross_entropy import NO_LABEL, rows_at_once
from bmojo.ops.layers import swiglu
from bmojo.ops.numerics import at_least_float32


def shard_names(index: Path) -> list[str]:
    """The files beside `index`, a model.safetensors.index.json, that it names. Raises ValueError if it is none."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({Path(file).name for file in files})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error


def require_weights(model: nn.Module, shapes: dict[str, tuple[int, ...]], otherwise: str) -> None:
    """Raise CheckpointError, `otherwise` and the first difference, unless a model has just the tensors of `shapes`."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shapes != expected:
        name = sorted(expected.items() ^ shapes.items())[0][0]
        got = shapes.get(name, "missing")
        raise CheckpointError(f"{otherwise}: {name} is {got}, expected {expected.get(name, 'no such tensor')}")


def read_safetensors(folder: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a model folder: model.safetensors, or the shards that model.safetensors.index.json names.

    Raises CheckpointError if one of the files is missing or corrupt.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            names = shard_names(index)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{index} is corrupt: {error!r}") from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name, device=device)
        except FileNotFoundError:
            raise CheckpointError(f"no checkpoint at {folder}: {name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} is corrupt: {error}") from None
    return tensors


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) * W_up x).  Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, std)
        self.down = Output(config.intermediate_size, config.hidden_size, std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """x + Mixer(RMSNorm(x)), then, unless intermediate_size is 0, x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = Mixer(config, index)
        has_mlp = config.intermediate_size > 0
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps) if has_mlp else None
        self.mlp = SwiGLU(config) if has_mlp else None

    def forward(
        self,
        x: Tensor,
        state: State | None,
        at: Layout | Step,
        traced: bool = False,
        storage: Storage | None = None,
    ) -> tuple[Tensor, State, Trace | None]:
        """What goes in and comes out are values, the trace too: a block that is sharded, or computed again for its
        gradients, works on copies of what it is given."""
        trace = Trace() if traced else None
        normed = self.mixer_norm(x)
        if isinstance(at, Step):
            assert state is not None
            mixed, state = self.mixer.step(normed, state, at, trace, storage)
        else:
            mixed, state = self.mixer.mix(normed, state, at, trace, storage)
        x = x + mixed
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))  # type: ignore[misc]
        return x, state, trace


def _restored(x: Tensor, at: Layout | Step) -> Tensor:
    """What was laid out, as [batch, time, hidden_size]."""
    return x[:, None] if isinstance(at, Step) else at.restore(x)


class BMojoLM(nn.Module):
    """A causal language model of the B'MOJO family.

        model = BMojoLM(presets.bmojo("tiny", vocab_size=256))
        logits, state = model(tokens)          # tokens [batch, time] -> logits [batch, time, vocab_size]
        logits, state = model(more, state)     # goes on where the first call ended, in constant memory

    Any way of cutting a sequence into calls gives the same logits and the same final state.

    `gradient_checkpointing`: in training, keep only the inputs of blocks and compute the rest again for the gradients.
    """

    gradient_checkpointing = False
    checkpoint: Callable = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        std = config.initializer_range
        self.embed = Embedding(config.vocab_size, config.hidden_size, std)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Head(config.hidden_size, config.vocab_size, std)

    def forward(
        self,
        tokens: Tensor,
        state: MemoryState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        donate: bool = False,
        trace: Trace | None = None,
        storage: Storage | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Logits [batch, time, vocab_size] for the token after each of `tokens` [batch, time]; the state after them.

        `mask` [batch, time]: False at padding, which leaves the state as it is; its logits are those of a zero vector.
        `document_ids` [batch, time]: every change starts a new document, with empty memories.
        `donate`: the state that came in is given up, and its buffers may be reused (decoding loops).
        `trace`: notes innovations, kept positions and auxiliary losses.
        `storage`: the in-storage memory of these rows, which goes with the state from call to call. Left out, there is
        none, but in training layers with storage read earlier blocks of their row, among those of all other rows.
        """
        features, state = self.features(
            tokens, state, mask=mask, document_ids=document_ids, donate=donate, trace=trace, storage=storage
        )
        return self.logits(features), state

    def features(
        self,
        tokens: Tensor,
        state: MemoryState | None = None,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        donate: bool = False,
        trace: Trace | None = None,
        storage: Storage | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """What the head reads, [batch, time, hidden_size], and the state: `forward` without the logits.

        In place of `tokens` may stand their embeddings [batch, time, hidden_size].
        """
        self._check(tokens, state)
        if state is not None and tokens.shape[1] == 1 and mask is None and document_ids is None:
            at: Layout | Step = Step(state.position, state.document, self.config.chunk_size, donate)
            x = self._embed(tokens[:, 0])
        else:
            at = make_layout(
                tokens.shape[0],
                tokens.shape[1],
                self.config.chunk_size,
                tokens.device,
                position=None if state is None else state.position,
                document=None if state is None else state.document,
                mask=mask,
                document_ids=document_ids,
            )
            x = self._embed(at.place(tokens))
        if storage is None and state is None and self.training and self.config.storage_layers:
            storage = Storage(self.config, tokens.shape[0], distractors=True, keep=False)
        if storage is not None:
            self._check_storage(storage, state)
            storage.begin(tokens, at)
        layers = []
        if trace is not None and trace.hidden is not None:
            trace.hidden.append(_restored(x, at))
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
            run = partial(self.checkpoint, block) if again else block
            x, layer, noted = run(x, before, at, trace is not None, storage)
            if trace is not None:
                trace.extend(noted)
            layers.append(layer)
            if trace is not None and trace.hidden is not None:
                trace.hidden.append(_restored(x, at))
        return self.norm(_restored(x, at)), MemoryState(self.config, tuple(layers))

    def _embed(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.is_floating_point() else self.embed(tokens.long())

    def logits(self, features: Tensor) -> Tensor:
        return self._head(features)

    def cross_entropy(self, features: Tensor, labels: Tensor) -> Tensor:
        """-sum log softmax(logits(features))[label] in nats, in float32 at least, of features [n, hidden_size] and
        labels int64 [n] (NO_LABEL: none). Never are all logits held at once, nor kept for the gradients."""
        head = self._head
        if isinstance(head, Embedding | Head):
            return head(features, labels)

        def part(features: Tensor, labels: Tensor) -> Tensor:  # of a head of another make: an adapter, say
            logits = at_least_float32(head(features))
            return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")

        rows = rows_at_once(self.config.vocab_size)
        if len(features) <= rows:
            return part(features, labels)
        parts = zip(features.split(rows), labels.split(rows), strict=True)
        return torch.stack([self.checkpoint(part, *piece) for piece in parts]).sum()

    @property
    def _head(self) -> nn.Module:
        return self.embed if self.head is None else self.head

    def empty_state(self, batch: int = 1, dtype: torch.dtype | None = None) -> MemoryState:
        """The state before any token."""
        weight = self.embed.weight
        dtype = weight.dtype if dtype is None else dtype
        mixers = (block.mixer for block in self.blocks)
        return MemoryState(self.config, tuple(m.empty_state(batch, weight.device, dtype) for m in mixers))  # type: ignore

    def _check(self, tokens: Tensor, state: MemoryState | None) -> None:
        whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        embedded = tokens.is_floating_point() and tokens.ndim == 3 and tokens.shape[-1] == self.config.hidden_size
        if not ((whole and tokens.ndim == 2) or embedded) or tokens.numel() == 0:
            raise ConfigError(
                "tokens must be whole numbers of shape [batch, time], both at least 1, or their embeddings "
                f"[batch, time, {self.config.hidden_size}], got {tokens.dtype} {tuple(tokens.shape)}"
            )
        dtype, autocast = self.embed.weight.dtype, torch.is_autocast_enabled(tokens.device.type)
        if embedded and tokens.dtype != dtype and not autocast:
            raise ConfigError(f"embeddings must be {dtype}, as the model is, got {tokens.dtype}")
        if state is not None:
            require_fit(state, self.config, tokens.shape[0], dtype)

    def _check_storage(self, storage: Storage, state: MemoryState | None) -> None:
        if storage.config is not self.config and storage.config != self.config:
            raise ConfigError("the storage was made for another configuration; make it with Storage(model.config)")
        if storage.keep and self.gradient_checkpointing and self.training:
            raise ConfigError(
                "storage that is kept can't be used with gradient checkpointing, which reads everything twice; "
                "use Storage(keep=False) or turn gradient_checkpointing off"
            )
        if not storage.keep and state is not None:
            raise ConfigError("storage with keep=False is for a whole row at once, got a state; use keep=True")

    def with_settings(self, **changes: Any) -> BMojoLM:
        """The same weights, shared, under other settings: those of storage, say. Raises CheckpointError if
        these weights are not those of such a model."""
        with torch.device("meta"):
            other = type(self)(self.config.replace(**changes))
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        require_weights(other, shapes, f"{', '.join(changes)}: the weights do not fit such a model")
        for name, module in other.named_modules():
            mine = self.get_submodule(name)
            module._parameters, module._buffers = mine._parameters, mine._buffers
        return other.train(self.training)

    def fingerprint(self) -> str:
        """What the weights are known by, 16 hex digits: a memory belongs to the model whose fingerprint it has."""
        return digest(self.state_dict())[:16]

    # checkpoints: a folder with config.json and model.safetensors, or shards and their index
    def save(self, folder: str | os.PathLike) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        entries = self.config.to_checkpoint() | {"dtype": str(self.embed.weight.dtype).removeprefix("torch.")}
        write_whole(folder / "config.json", (json.dumps(entries, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "cpu") -> BMojoLM:
        """The model that `save`, or `save_pretrained` of BMojoForCausalLM, wrote.

        Raises CheckpointError for a folder that is missing, corrupt, foreign, or of a newer format.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {folder}: config.json is missing")
        config = ModelConfig.read(path)
        tensors = {name.removeprefix("model."): tensor for name, tensor in read_safetensors(folder, device).items()}
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        require_weights(model, shapes, f"the weights in {folder} do not belong to its config.json")
        model.load_state_dict(tensors, assign=True)
        return model
