"""Programs for compilers of whole graphs, such as those of Trainium and other XLA devices.

The training step and the decode step of a model are written here as pure functions of tensors; `trace` turns one into
a graph of ATen operators (`torch.export`) with static shapes and no control flow, and `Program` that into StableHLO,
which XLA compiles here on the CPU, and neuronx-cc for a NeuronCore.

    program = lower.trace(*lower.training_step(model, batch=8, time=2048))
    program.stablehlo()              # text
    program.operators()              # {"stablehlo.dot_general": 111, ...}
    loss, state = program.compile()(state, lr, tokens, labels)

StableHLO needs the packages of `bmojo[xla]`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from bmojo.errors import ConfigError, MissingPackageError
from bmojo.memory.state import MemoryState
from bmojo.memory.step import grow
from bmojo.nn.init import decays
from bmojo.nn.loss import NO_LABEL, auxiliary_loss, auxiliary_trace, cross_entropy
from bmojo.nn.model import BMojoLM
from bmojo.ops.dispatch import lowering_for

Weights = dict[str, Tensor]
Layers = tuple[dict[str, Tensor], ...]
Lowerable = tuple[Callable[..., Any], tuple[Any, ...]]  # a pure function, and an example of its arguments


def weights_of(model: BMojoLM) -> Weights:
    """Parameters and buffers by name, detached."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def training_state(model: BMojoLM) -> dict[str, Any]:
    """What `training_step` starts from: the weights, and AdamW's moments at zero."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    return {
        "weights": weights_of(model),
        "mean": zeros,
        "square": {name: tensor.clone() for name, tensor in zeros.items()},
        "step": torch.zeros(()),
    }


def training_step(
    model: BMojoLM, *, batch: int, time: int, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> Lowerable:  # fmt: skip
    """(state, learning_rate, tokens, labels) -> (loss, state): forward, loss, gradients and AdamW in one program.

    `state` is that of `training_state`, learning_rate a tensor without dimensions, tokens and labels int64
    [batch, time] (label NO_LABEL: predict nothing here). The loss is that of `bmojo.train.loss.next_token_loss`,
    auxiliary losses included; the update is `torch.optim.AdamW`'s, with weight decay on the parameters that have the
    role alone.
    """
    config, decayed = model.config, decays(model)

    def loss(trained: Weights, fixed: Weights, tokens: Tensor, labels: Tensor) -> Tensor:
        trace = auxiliary_trace(config)
        logits, _ = functional_call(model, trained | fixed, (tokens,), {"trace": trace})
        count = (labels != NO_LABEL).sum().clamp(min=1)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), count) + auxiliary_loss(trace)

    def step(state: dict[str, Any], learning_rate: Tensor, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        weights, count = state["weights"], state["step"] + 1
        fixed = {name: tensor for name, tensor in weights.items() if name not in decayed}
        trained = {name: weights[name] for name in decayed}
        gradients, value = grad_and_value(loss)(trained, fixed, tokens, labels)
        correction, root = 1 - betas[0] ** count, (1 - betas[1] ** count).sqrt()
        mean, square = {}, {}
        for name, gradient in gradients.items():
            mean[name] = betas[0] * state["mean"][name] + (1 - betas[0]) * gradient
            square[name] = betas[1] * state["square"][name] + (1 - betas[1]) * gradient * gradient
            kept = trained[name] * (1 - learning_rate * weight_decay) if decayed[name] else trained[name]
            update = mean[name] / correction / (square[name].sqrt() / root + eps)
            trained[name] = kept - learning_rate * update
        return value, {"weights": trained | fixed, "mean": mean, "square": square, "step": count}

    tokens, labels = (torch.zeros(batch, time, dtype=torch.int64) for _ in range(2))  # one tensor would be one input
    return step, (training_state(model), torch.tensor(1e-3), tokens, labels)


def prefill(model: BMojoLM, *, batch: int, time: int, context: int = 0) -> Lowerable:
    """(weights, tokens int64 [batch, time]) -> (logits of the token after them [batch, vocab_size], state).

    Caches without a window get room for `context` tokens.
    """

    def run(weights: Weights, tokens: Tensor) -> tuple[Tensor, Layers]:
        logits, state = functional_call(model, weights, (tokens,))
        return logits[:, -1], _with_room(state, context).layers

    return run, (weights_of(model), torch.zeros(batch, time, dtype=torch.int64))


def decode_step(model: BMojoLM, *, batch: int, context: int = 0) -> Lowerable:
    """(weights, state, tokens int64 [batch]) -> (logits [batch, vocab_size], state): one token a row.

    The state, the `layers` of a MemoryState, goes in and comes out with the same shapes. An attention layer without a
    window has a cache for `context` tokens and no more.
    Raises ConfigError if there is such a layer, and no context is given.
    """
    if not context and any(kind != "ssm" and model.config.window_of(kind) is None for kind in model.config.kinds):
        raise ConfigError(
            "a decode step of static shape needs a context for layers that attend to everything, got none; "
            "give the number of tokens that their cache is to hold"
        )

    def run(weights: Weights, layers: Layers, tokens: Tensor) -> tuple[Tensor, Layers]:
        logits, state = functional_call(model, weights, (tokens[:, None], MemoryState(model.config, tuple(layers))))
        return logits[:, 0], state.layers

    empty = _with_room(model.empty_state(batch), context)
    return run, (weights_of(model), empty.layers, torch.zeros(batch, dtype=torch.int64))


def _with_room(state: MemoryState, context: int) -> MemoryState:
    """The state with room for `context` tokens in its caches without a window."""
    grown = []
    for kind, layer in zip(state.config.kinds, state.layers, strict=True):
        caches = ("k", "v") if kind != "ssm" and state.config.window_of(kind) is None else ()
        grown.append({name: grow(rows, context) if name in caches else rows for name, rows in layer.items()})
    return MemoryState(state.config, tuple(grown))


def trace(function: Callable[..., Any], example: tuple[Any, ...]) -> Program:
    """The graph of a pure function at the shapes of `example`, in the forms for XLA; nothing is computed."""
    with lowering_for("xla"), _quiet():
        graph = make_fx(function, _DECOMPOSITIONS, tracing_mode="fake")(*example)
        return Program(torch.export.export(graph, example, strict=False))


def _slice_backward(grad: Tensor, sizes: list[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """Zeros around what was cut out; XLA would scatter it into them."""
    if step != 1:
        return NotImplemented
    before = start + sizes[dim] if start < 0 else start
    return _pad(grad, sizes, dim, before)


def _select_backward(grad: Tensor, sizes: list[int], dim: int, index: int) -> Tensor:
    dim = dim % len(sizes)
    return _pad(grad.unsqueeze(dim), sizes, dim, index % sizes[dim])


def _pad(x: Tensor, sizes: list[int], dim: int, before: int) -> Tensor:
    dim = dim % len(sizes)
    after = sizes[dim] - before - x.shape[dim]
    return torch.constant_pad_nd(x, (0, 0) * (len(sizes) - 1 - dim) + (before, after))


def _remainder(x: Tensor, divisor: int) -> Tensor:
    """Of integers by a power of two, of any sign: what Neuron's list of operators has, and exact at any position."""
    return x & (divisor - 1) if _is_power(x, divisor) else NotImplemented


def _floor_divide(x: Tensor, divisor: int) -> Tensor:
    return x >> (divisor.bit_length() - 1) if _is_power(x, divisor) else NotImplemented


def _is_power(x: Tensor, divisor: int) -> bool:
    whole = isinstance(divisor, int) and not x.dtype.is_floating_point
    return whole and divisor > 0 and divisor & (divisor - 1) == 0


def _cumsum(x: Tensor, dim: int, **_: Any) -> Tensor:
    return NotImplemented if x.dtype.is_floating_point else x.to(torch.float32).cumsum(dim).long()


def _any(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return x.to(torch.float32).amax(dim, keepdim) > 0


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Without torchax' check of the indices, a reduction that Neuron has not."""
    return x.movedim(dim, 0)[index].movedim(0, dim)


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cumsum.default: _cumsum,
    torch.ops.aten.any.dim: _any,
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.embedding.default: lambda weight, indices, *_: weight[indices],
    torch.ops.aten.remainder.Scalar: _remainder,
    torch.ops.aten.floor_divide.default: _floor_divide,
    # torchax looks up the label that means none; PyTorch's own decomposition masks it
    **get_decompositions([torch.ops.aten.nll_loss_forward, torch.ops.aten.nll_loss_backward]),
    torch.ops.aten.slice_backward.default: _slice_backward,
    torch.ops.aten.select_backward.default: _select_backward,
}


@dataclass(frozen=True)
class Program:
    """A graph with static shapes. Arguments and results are those of the function it was traced from."""

    exported: torch.export.ExportedProgram

    @functools.cached_property
    def _lowered(self) -> Any:
        jax, torchax = _torchax()
        environment, spec = torchax.default_env(), self.exported.call_spec
        table = {**torch.export.default_decompositions(), **torchax.decompositions.DECOMPOSITIONS}
        with _quiet():
            core = self.exported.run_decompositions(table)
        held = environment.t2j_copy(dict(core.constants))
        specs = core.graph_signature.input_specs

        def function(*args: Any) -> Any:
            given = iter(spec.in_spec.flatten_up_to((args, {})))  # JAX sorts what is in a dict, the graph does not
            inputs = [held[one.target] if one.target in held else next(given) for one in specs]
            results = torchax.export.JaxInterpreter(core.graph_module).run(*inputs, enable_io_processing=False)
            return pytree.tree_unflatten(results, spec.out_spec)

        shapes = [jax.ShapeDtypeStruct(value.shape, _jax_type(value.dtype)) for value in self._inputs]
        arguments, _ = pytree.tree_unflatten(shapes, spec.in_spec)
        with _quiet():
            return jax.jit(function, keep_unused=True).lower(*arguments)

    @property
    def _inputs(self) -> list[Tensor]:
        by_name = {node.name: node.meta["val"] for node in self.exported.graph.nodes if node.op == "placeholder"}
        return [by_name[name] for name in self.exported.graph_signature.user_inputs]

    def stablehlo(self) -> str:
        """The program as text, with one function `main`; integers are 32 bits wide, as NeuronCores have them."""
        return self._lowered.as_text()

    def hlo(self) -> bytes:
        """The program as a serialised HloModuleProto: what `neuronx-cc compile --framework XLA` reads."""
        return self._lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()

    def _operations(self) -> Iterator[Any]:
        todo = [self._lowered.compiler_ir("stablehlo").operation]
        while todo:
            operation = todo.pop()
            yield operation
            todo += [inner.operation for region in operation.regions for block in region for inner in block.operations]

    def operators(self) -> Counter[str]:
        """How often each operator occurs. With the name of a custom call goes its target, with that of an operator
        that Neuron compiles in part what it is made of: "reduce add f32", "scatter i32" (which overwrites)."""
        names = (_described(operation) for operation in self._operations())
        return Counter(name for name in names if name is not None)

    def element_types(self) -> set[str]:
        """The types of number that the program computes with, such as "f32" and "i1"."""
        results = (result.type for operation in self._operations() for result in operation.results)
        return {str(getattr(kind, "element_type", kind)) for kind in results}

    def undocumented(self) -> list[str]:
        """The operators, and types of number, that Neuron's documentation does not say that it compiles."""
        known = neuron_operators()
        documented = known["listed"].keys() | known["elsewhere"].keys() | known["in_part"].keys()
        return sorted(self.operators().keys() - documented | self.element_types() - set(known["element_types"]))

    def compile(self) -> Callable[..., Any]:
        """The program compiled by XLA for JAX's default device, as a function of tensors."""
        _, torchax = _torchax()
        environment, run = torchax.default_env(), self._lowered.compile()

        def call(*args: Any) -> Any:
            converted = pytree.tree_map_only(Tensor, environment.t2j_copy, args)
            return pytree.tree_map(lambda array: torch.from_numpy(_writable(array)), run(*converted))

        return call


def _described(operation: Any) -> str | None:
    """What `Program.operators` calls an operation; None for what is structure alone."""
    dialect, _, name = operation.name.partition(".")
    if dialect in ("builtin", "func") or name == "return":
        return None
    if dialect != "stablehlo":
        return operation.name
    match name:
        case "custom_call":
            return f"{name} {operation.attributes['call_target_name'].value}"
        case "reduce" | "reduce_window" | "scatter":
            steps = [step.operation.name.partition(".")[2] for step in operation.regions[0].blocks[0].operations]
            return " ".join([name, *steps[:-1], *(str(result.type.element_type) for result in operation.results)])
        case "dot_general":
            return f"{name} {operation.operands[0].type.element_type}"
    return name


def _writable(array: Any) -> Any:
    import numpy as np

    return np.array(array)


@functools.cache
def neuron_operators() -> dict[str, Any]:
    """What the Neuron compiler documents of operators, by StableHLO name, with its source and date."""
    return json.loads(files("bmojo").joinpath("neuron_operators.json").read_text(encoding="utf-8"))


@functools.cache
def _torchax() -> tuple[Any, Any]:
    """jax and torchax, imported without what they change for others."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        import jax

        with _dropped_overloads():
            import torchax
            import torchax.export
    except ImportError as error:
        raise MissingPackageError(f"StableHLO needs the package {error.name}: pip install 'bmojo[xla]'") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return jax, torchax


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch warns itself of, and that JAX makes integers 32 bits wide: that is as asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
        warnings.filterwarnings("ignore", "Explicitly requested dtype int64", UserWarning)
        yield


@contextlib.contextmanager
def _dropped_overloads() -> Iterator[None]:
    """torchax 0.0.13 names overloads for named dimensions, which PyTorch 2.13 no longer has: any other will do."""
    packet = torch._ops.OpOverloadPacket
    strict = packet.__getattr__

    def lenient(self: Any, name: str) -> Any:
        try:
            return strict(self, name)
        except AttributeError:
            if "name" not in name.lower():
                raise
            return getattr(self, self.overloads()[0])

    packet.__getattr__ = lenient  # type: ignore[method-assign]
    try:
        yield
    finally:
        packet.__getattr__ = strict  # type: ignore[method-assign]


def _jax_type(dtype: torch.dtype) -> Any:
    _, torchax = _torchax()
    return torchax.ops.mappings.t2j_dtype(dtype)
