"""What is measured: cells, each a contest at one setting, by suite.

    stream    memory of the process over a long stream
    ops       each op at the sizes of the preset that uses it; forward, and forward with backward
    layers    mixers alone
    train     loss and gradients of whole models; "growth": the same model at 4 times the length
    prefill   a forward pass that leaves a state (or cache) behind
    decode    tokens one by one after a context; "growth": the same model after a longer one
    memory    peak memory in training by length, with and without gradient checkpointing, and of the loss alone
    choices   what each choice of the layer costs

The first contestant of a cell is ours, and ratios are to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo import presets
from bmojo.bench import floor, rivals
from bmojo.bench.contest import Contestant, Missing, Runner
from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, nearest
from bmojo.eval.decode import states_at
from bmojo.memory.eidetic import select
from bmojo.memory.layout import make_layout
from bmojo.memory.read import Slots, Source, key_spans, read, slot_spans
from bmojo.memory.spec import innovation_dim
from bmojo.memory.state import MemoryState
from bmojo.nn.mixer import Mixer
from bmojo.nn.model import BMojoLM
from bmojo.ops.attention import attend
from bmojo.ops.cross_entropy import linear_cross_entropy
from bmojo.ops.dispatch import use_backend
from bmojo.ops.gated_delta import gated_delta
from bmojo.ops.innovation import rls, rls_start
from bmojo.ops.s6 import s6
from bmojo.ops.ssd import ssd
from bmojo.train.loss import next_token_loss

LENGTHS = {"ops": (1024,), "layers": (1024,), "train": (512, 2048), "prefill": (2048,), "memory": (1024, 4096),
           "choices": (1024,)}  # fmt: skip
CONTEXTS = (1024, 8192)
LONGEST_EAGER = 4096  # longer, the scores of attention that writes them out take many GiB
LONGEST_READ = 16384  # a model that can't read it in segments, or takes its square, reads no longer context
DECODED = 64  # tokens of a timed run: a whole chunk, so that what a chunk's end costs is in it
VOCABULARY = 8192  # of the cross entropy at least
PAPER_VOCABULARY = 50280  # GPT-NeoX's
MOST_LOGIT_BYTES = 2**30
PLAIN = "bmojo, plain PyTorch"
PASSES = {False: "forward", True: "forward + backward"}

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "admission by innovation": {"admission": "innovation"},
    "innovation ema": {"innovation": "ema"},
    "innovation state": {"innovation": "state"},
    "innovation head": {"innovation": "head"},
    "innovation recent": {"innovation": "recent"},
    "no eidetic slots": {"eidetic_slots": 0},
    "true positions": {"positions": "true"},
    "fading summary": {"fading": "summary"},
    "no fading memory": {"fading_span": 0},
    "untied sources": {"tie_sources": False},
    "no key convolution": {"conv_size": 0},
    "ssm gdn": {"ssm": "gdn", "ssm_groups": 4},
}


@dataclass(frozen=True)
class Plan:
    """What to measure. `lengths`: instead of LENGTHS; `changes`: of the presets' settings, one after another."""

    suites: tuple[str, ...]
    size: str = "tiny"
    lengths: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = CONTEXTS
    changes: tuple[dict[str, Any], ...] = ({},)
    models: tuple[str, ...] = tuple(presets.PRESETS)
    stream_tokens: int = 100_000
    compiled: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                raise ConfigError(f"unknown suite {suite!r}; {nearest(suite, SUITES)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"unknown dtype {self.dtype!r}; {nearest(self.dtype, ('float32', 'bfloat16'))}")
        if self.dtype == "bfloat16" and self.device != "cuda":
            raise ConfigError("bfloat16 is measured on a GPU alone, and none is here; use float32")
        for changes in self.changes:
            chunks = {config_of(name, self.size, changes).chunk_size for name in (*self.models, "bmojo")}
            for length in (self.lengths or ()) if "ops" in self.suites else ():
                if short := [chunk for chunk in sorted(chunks) if length % chunk]:
                    below = length // short[0] * short[0]
                    raise ConfigError(
                        f"the lengths of ops must be multiples of chunk ({short[0]}), got {length}; "
                        f"use {below + short[0]}"
                    )

    def cells(self) -> Iterator[Cell]:
        """In the order of SUITES."""
        for name, cells in SUITES.items():
            if name in self.suites:
                for changes in self.changes:
                    for batch in self.batches:
                        yield from cells(Setting(self, name, batch, changes))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Cell:
    """A contest. `settings` tell it from all others. `stream`: the model that a long stream goes through, instead."""

    suite: str
    case: str
    settings: dict[str, Any]
    contestants: tuple[Contestant, ...] = ()
    stream: ModelConfig | None = None

    @property
    def name(self) -> str:
        shown = {k: v for k, v in self.settings.items() if k not in ("size", "dtype", "set") and v is not None}
        shown |= self.settings["set"]
        return f"{self.suite} {self.case}: {', '.join(f'{k} {v}' for k, v in shown.items())}"


@dataclass(frozen=True)
class Setting:
    """A plan, with one of its batches and changes, in one of its suites."""

    plan: Plan
    suite: str
    batch: int
    changes: dict[str, Any]

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.plan.lengths or LENGTHS[self.suite]

    def config(self, name: str, **more: Any) -> ModelConfig:
        """At equal parameters."""
        return config_of(name, self.plan.size, {**self.changes, **more})

    def twin(self, name: str, **more: Any) -> ModelConfig:
        """As the preset is."""
        return config_of(name, self.plan.size, {**self.changes, **more}, presets.get)

    def cell(self, case: str, contestants: Sequence[Contestant], **settings: Any) -> Cell:
        common = {"batch": self.batch, "size": self.plan.size, "dtype": self.plan.dtype, "set": self.changes}
        if self.plan.compiled and any(contestant.compiled for contestant in contestants):
            common["compiled"] = True
        if case == "family" and set(self.plan.models) != set(presets.PRESETS):
            common["models"] = sorted(self.plan.models)
        return Cell(self.suite, case, {**settings, **common}, tuple(contestants))

    def tokens(self, time: int, vocab_size: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (self.batch, time), generator=draw).to(self.plan.device)

    def normal(self, *shape: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=draw).to(self.plan.device)

    def precision(self) -> contextlib.AbstractContextManager:
        """Products in bfloat16, if that is the dtype: parameters stay float32."""
        return torch.autocast(self.plan.device, torch.bfloat16, enabled=self.plan.dtype == "bfloat16")


def config_of(
    name: str, size: str, changes: dict[str, Any], make: Callable[..., ModelConfig] = presets.matched
) -> ModelConfig:
    """A preset with those of the changes that its layers can have."""
    return make(name, size, **{key: value for key, value in changes.items() if key not in presets.foreign(name)})


# ops
def ops(at: Setting) -> Iterator[Cell]:
    for time in at.lengths:
        for backward in (False, True):
            for case in (_ssd, _gated_delta, _s6, _read, _cross_entropy):
                yield at.cell(case.__name__[1:], case(at, time, backward), **{"pass": PASSES[backward]}, time=time)
        for forward_only in (_rls, _select):
            name = forward_only.__name__[1:]
            yield at.cell(name, forward_only(at, time), **{"pass": PASSES[False]}, time=time)


Op = Callable[..., Tensor]


def _op(
    at: Setting, name: str, make: Callable[[], Op], inputs: Sequence[Tensor], time: int, backward: bool,
    multiply_adds: float | None, **kind: bool,
) -> Contestant:  # fmt: skip
    """A function of tensors. Its result is taken to be as large as its first argument."""
    work = None
    if multiply_adds is not None:
        work = floor.op_work(multiply_adds, *inputs, inputs[0], backward=backward)
    return Contestant(name, lambda: _op_runner(at, make(), inputs, backward), at.batch * time, work, **kind)


def _op_runner(at: Setting, op: Op, inputs: Sequence[Tensor], backward: bool) -> Runner:
    if not backward:
        return Runner(partial(_without_gradients, at, partial(op, *inputs)))
    inputs = [z.detach().requires_grad_(z.is_floating_point()) for z in inputs]
    return Runner(partial(_with_gradients, at, partial(op, *inputs), [z for z in inputs if z.requires_grad]))


@torch.inference_mode()
def _without_gradients(at: Setting, function: Callable[[], Any]) -> None:
    with at.precision():
        function()


def _with_gradients(at: Setting, function: Callable[[], Any], leaves: Sequence[Tensor]) -> None:
    with at.precision():
        y = function()
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def _first(op: Callable[..., tuple[Tensor, Any]], *inputs: Tensor, **options: Any) -> Tensor:
    return op(*inputs, **options)[0]


def _plain(op: Op) -> Op:
    """The op in plain PyTorch, where it has a kernel too."""

    def run(*inputs: Tensor) -> Tensor:
        with use_backend("chunked"):
            return op(*inputs)

    return run


def _scan_inputs(at: Setting, config: ModelConfig, time: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, heads = at.plan.torch_dtype, config.ssm_heads
    x = at.normal(at.batch, time, heads, config.ssm_head_dim).to(dtype)
    dt = F.softplus(at.normal(at.batch, time, heads) - 4)
    A_log = torch.linspace(0, 2.7, heads, device=x.device)
    B, C = (at.normal(at.batch, time, config.ssm_groups, config.ssm_state_size).to(dtype) for _ in range(2))
    return x, dt, A_log, B, C


def _ssd(at: Setting, time: int, backward: bool) -> list[Contestant]:
    config = at.config("mamba2")
    inputs, chunk, device = _scan_inputs(at, config, time), config.chunk_size, at.plan.device
    within = config.ssm_groups * config.ssm_state_size + config.ssm_size
    products = at.batch * time * (min(chunk, time) * within / 2 + 2 * config.ssm_size * config.ssm_state_size)
    enter = partial(_op, at, inputs=inputs, time=time, backward=backward, multiply_adds=products)
    return [
        enter("bmojo", lambda: partial(_first, ssd, chunk_size=chunk)),
        enter(PLAIN, lambda: _plain(partial(_first, ssd, chunk_size=chunk))),
        enter("fla", lambda: rivals.fla_ssd(device), rival=True),
        enter("mamba-ssm", lambda: rivals.mamba_ssm_ssd(device, chunk), rival=True),
    ]


def _gated_delta(at: Setting, time: int, backward: bool) -> list[Contestant]:
    config, dtype, device = at.config("gdn"), at.plan.torch_dtype, at.plan.device
    heads, chunk, size = config.ssm_heads, config.chunk_size, config.ssm_state_size
    q, k = (F.normalize(at.normal(at.batch, time, heads, size), dim=-1).to(dtype) for _ in range(2))
    v = at.normal(at.batch, time, heads, config.ssm_head_dim).to(dtype)
    beta, g = at.normal(at.batch, time, heads).sigmoid(), -F.softplus(at.normal(at.batch, time, heads))
    within = 3 * heads * size + config.ssm_size
    products = at.batch * time * (min(chunk, time) * within / 2 + 3 * config.ssm_size * size)
    enter = partial(_op, at, inputs=(q, k, v, beta, g), time=time, backward=backward, multiply_adds=products)
    return [
        enter("bmojo", lambda: partial(_first, gated_delta, chunk_size=chunk)),
        enter(PLAIN, lambda: _plain(partial(_first, gated_delta, chunk_size=chunk))),
        enter("transformers", lambda: rivals.qwen3_gated_delta(device, chunk), rival=True),
        enter("fla", lambda: rivals.fla_gated_delta(device), rival=True),
    ]


def _s6(at: Setting, time: int, backward: bool) -> list[Contestant]:
    """Each channel on its own, at the sizes of Mamba-1: twice the hidden size, states of 16 numbers."""
    dtype, device = at.plan.torch_dtype, at.plan.device
    config = at.config("mamba2")
    channels, size, chunk = 2 * config.hidden_size, 16, config.chunk_size
    x = at.normal(at.batch, time, channels).to(dtype)
    dt = F.softplus(at.normal(at.batch, time, channels) - 4)
    A_log = torch.arange(1.0, size + 1, device=device).log().repeat(channels, 1)
    B, C = (at.normal(at.batch, time, size).to(dtype) for _ in range(2))
    products = at.batch * time * channels * size * 3
    enter = partial(_op, at, inputs=(x, dt, A_log, B, C), time=time, backward=backward, multiply_adds=products)
    return [
        enter("bmojo", lambda: partial(_first, s6, chunk_size=chunk)),
        enter(PLAIN, lambda: _plain(partial(_first, s6, chunk_size=chunk))),
        enter("mambapy", lambda: rivals.mambapy_s6(device), rival=True),
        enter("associative_scan", lambda: rivals.associative_scan_s6(device, False), rival=True),
        enter("associative_scan compiled", lambda: rivals.associative_scan_s6(device, True), rival=True, compiled=True),
        enter("mamba-ssm", lambda: rivals.mamba_ssm_s6(device), rival=True),
    ]


def _read(at: Setting, time: int, backward: bool) -> list[Contestant]:
    """The softmax of window, fading tokens and slots; and, of the same heads, attention over everything."""
    config, dtype, device = at.config("bmojo"), at.plan.torch_dtype, at.plan.device
    W, span, stride = config.window, config.fading_span, config.fading_stride
    assert W is not None
    layout = make_layout(at.batch, time, config.chunk_size, torch.device(device))

    def heads(*shape: int, count: int = config.num_kv_heads) -> Tensor:
        return at.normal(at.batch, *shape, count, config.head_dim).to(dtype)

    geometries = [(W, 1, 0, W)] + [((W + span) // stride, stride, W, span)] * (span > 0)
    rows = [size + layout.slots // stride for size, stride, _, _ in geometries]
    starts = torch.arange(0, layout.slots, layout.chunk, device=device)[:, None]
    slot = torch.arange(config.eidetic_slots, device=device)
    position = (slot * starts // max(1, config.eidetic_slots)).masked_fill(starts == 0, -1).expand(at.batch, -1, -1)
    spans = slot_spans(position, layout, W)
    seen = [key_spans(layout, *geometry) for geometry in geometries] + [spans]
    pairs = sum(int((last - first + 1).clamp(min=0).expand(at.batch, *last.shape[1:]).sum()) for first, last in seen)
    q = heads(layout.slots, count=config.num_heads)
    memories = [heads(n) for n in rows for _ in range(2)] + [heads(layout.chunks, config.eidetic_slots)] * 2

    def ours(q: Tensor, *kv: Tensor) -> Tensor:
        sources = [Source(kv[2 * i], kv[2 * i + 1], *geometry) for i, geometry in enumerate(geometries)]
        return read(q, sources, Slots(kv[-2], kv[-1], *spans), layout)[0]

    enter = partial(_op, at, time=time, backward=backward)
    products = 2 * config.num_heads * config.head_dim * pairs
    full = config.num_heads * config.head_dim * at.batch * time * (time + 1)
    tokens = [heads(time, count=config.num_heads) for _ in range(3)]
    whole = [z.transpose(1, 2) for z in tokens]
    flash = partial(rivals.flash_attention, device)
    plain = [enter(PLAIN, lambda: _plain(ours), (q, *memories), multiply_adds=products)] if device == "cuda" else []
    return [
        enter("bmojo", lambda: ours, (q, *memories), multiply_adds=products),
        *plain,
        enter("full attention", lambda: partial(attend, causal=True), whole, multiply_adds=full),
        enter("flash-attn, full", lambda: flash(None), tokens, multiply_adds=full, rival=True),
        enter("flash-attn, window", lambda: flash(W), tokens, multiply_adds=None, rival=True),
    ]


def _cross_entropy(at: Setting, time: int, backward: bool, least: int = VOCABULARY) -> list[Contestant]:
    """Of a head and its vocabulary, `least` at least."""
    config = at.config("bmojo")
    count, size = at.batch * time, max(least, config.vocab_size)
    x = at.normal(count, config.hidden_size).to(at.plan.torch_dtype)
    weight = (at.normal(size, config.hidden_size) * config.hidden_size**-0.5).to(at.plan.torch_dtype)
    products = count * size * config.hidden_size

    def torch_s() -> Op:
        if 4 * count * size > MOST_LOGIT_BYTES:
            raise Missing("all logits at once take more than a GiB")
        return lambda x, weight, labels: F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    inputs = (x, weight, at.tokens(time, size).flatten())
    enter = partial(_op, at, inputs=inputs, time=time, backward=backward, multiply_adds=products)
    return [enter("bmojo", lambda: linear_cross_entropy), enter("torch", torch_s, rival=True)]


def _rls(at: Setting, time: int) -> list[Contestant]:
    config = at.config("bmojo")
    dim, chunk = innovation_dim(config), config.chunk_size
    padded = -(-time // chunk) * chunk
    k = F.normalize(at.normal(at.batch, padded, dim), dim=-1)
    valid = torch.ones(at.batch, padded, dtype=torch.bool, device=k.device)
    start = rls_start(at.batch, dim, k)
    products = at.batch * time * (3 * dim * dim + chunk * dim)

    def score(k: Tensor) -> Tensor:
        return rls(k, valid, *start, chunk_size=chunk, forgetting=config.innovation_forgetting)[0]

    return [_op(at, "bmojo", lambda: score, (k,), time, False, products)]


def _select(at: Setting, time: int) -> list[Contestant]:
    config = at.config("bmojo")
    layout = make_layout(at.batch, time, config.chunk_size, torch.device(at.plan.device))
    score = at.normal(at.batch, layout.slots).abs()

    def choose(score: Tensor) -> Tensor:
        return select(score, layout, config.eidetic_slots, decay=1.0, threshold=0.0)[0]

    return [_op(at, "bmojo", lambda: choose, (score,), time, False, 0)]


# layers
def layers(at: Setting) -> Iterator[Cell]:
    device = at.plan.device
    twins: list[tuple[str, ModelConfig, dict[str, Callable[..., Any]]]] = [
        ("mamba2", at.twin("mamba2", intermediate_size=0), {"transformers": rivals.mamba2_layer}),
        ("gdn", at.twin("gdn"), {"transformers": rivals.qwen3_next_layer}),
    ]
    if "mamba" in presets.PRESETS:
        others = {"mambapy": rivals.mambapy_layer, "transformers with mambapy": rivals.mamba_layer}
        twins.append(("mamba", at.twin("mamba", intermediate_size=0), others))
    window = at.config("swa")
    memories = {"bmojo": at.config("bmojo"), "bmojo_f": at.config("bmojo_f")}
    for time in at.lengths:
        for backward in (False, True):
            settings = {"pass": PASSES[backward], "time": time}
            enter = partial(_layer, at, time=time, backward=backward)
            for name, ours in memories.items():
                scan = ours.replace(pattern=("ssm",), fading_span=0, eidetic_slots=0, window=None)
                apart = [enter("window and ssd apart", partial(_mixers, window, scan))]
                only = [enter("window", partial(_mixers, window), window)]
                yield at.cell(name, [*_our_layer(at, ours, time, backward), *apart, *only], **settings)
            for name, ours, rival_layers in twins:
                theirs = [
                    enter(who, partial(_one, make, ours, device), ours, rival=True)
                    for who, make in rival_layers.items()
                ]
                yield at.cell(name, [*_our_layer(at, ours, time, backward), *theirs], **settings)


def _mixers(*configs: ModelConfig) -> list[Any]:
    return [Mixer(config) for config in configs]


def _one(make: Callable[..., Any], *arguments: Any) -> list[Any]:
    return [make(*arguments)]


def _our_layer(at: Setting, config: ModelConfig, time: int, backward: bool) -> list[Contestant]:
    enter = partial(_layer, at, time=time, backward=backward, work=config)
    found = [enter("bmojo", partial(_mixers, config))]
    if at.plan.compiled:
        found.append(enter("bmojo compiled", lambda: [torch.compile(Mixer(config))], compiled=True))
    return found


def _layer(
    at: Setting, name: str, make: Callable[[], Sequence[Any]], work: ModelConfig | None = None, *, time: int,
    backward: bool, **kind: bool,
) -> Contestant:  # fmt: skip
    """One or more layers that are run one after the other on the same input. `work`: whose work is counted."""

    def build() -> Runner:
        torch.manual_seed(0)
        layers = [layer.to(at.plan.device) for layer in make()]
        weights = [weight for layer in layers for weight in layer.parameters()]
        x = at.normal(at.batch, time, _width(at)).requires_grad_(backward)

        def run() -> None:
            for layer in layers:
                if backward:
                    own = [weight for weight in layer.parameters() if weight.requires_grad]
                    _layer_gradients(at, layer, x, own)
                else:
                    _without_gradients(at, partial(layer, x))

        return Runner(run, parameters=sum(weight.numel() for weight in weights))

    counted = None
    if work is not None:
        counted = floor.layer_work(work, at.batch, time, backward=backward)
    return Contestant(name, build, at.batch * time, counted, **kind)


def _layer_gradients(at: Setting, layer: Any, x: Tensor, weights: Sequence[Tensor]) -> None:
    with at.precision():
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
    torch.autograd.grad(
        y, [x, *weights], torch.ones_like(y), allow_unused=True
    )  # what chooses slots learns by its loss


def _width(at: Setting) -> int:
    return at.config("bmojo").hidden_size


# models
def train(at: Setting) -> Iterator[Cell]:
    for time in at.lengths:
        yield from _models(at, time, True)
    for time in at.lengths:
        if 4 * time in at.lengths:
            config = at.config("bmojo")
            pair = [_model(at, f"{n:,} tokens", config, n, True) for n in (time, 4 * time)]
            yield at.cell("growth", pair, **{"pass": PASSES[True]}, time=time)


def prefill(at: Setting) -> Iterator[Cell]:
    for time in at.lengths:
        yield from _models(at, time, False)


def _models(at: Setting, time: int, backward: bool) -> Iterator[Cell]:
    settings = {"pass": PASSES[backward], "time": time}
    enter = partial(_model, at, time=time, backward=backward)
    family = [enter(name, at.config(name)) for name in _bmojo_first(at.plan.models)]
    if at.plan.compiled:
        family += [
            enter(f"{name} compiled", at.config(name), compiled=True)
            for name in ("bmojo", "mamba2")
            if name in at.plan.models
        ]
    if len(family) > 1:
        yield at.cell("family", family, **settings)
    mamba2, llama = at.twin("mamba2", intermediate_size=0), at.twin("transformer")
    theirs = partial(_their_model, at, time=time, backward=backward)
    yield at.cell("mamba2", [enter("bmojo", mamba2), theirs("transformers", mamba2, "mamba2")], **settings)
    attention = [("transformers", "sdpa"), ("transformers, eager", "eager")]
    if at.plan.device == "cuda":
        attention.append(("transformers, flash-attn", "flash_attention_2"))
    yield at.cell(
        "transformer",
        [enter("bmojo", llama), *(theirs(name, llama, "llama", kind) for name, kind in attention)],
        **settings,
    )


def _bmojo_first(models: Sequence[str]) -> list[str]:
    return sorted(models, key=lambda name: name != "bmojo")


def _build(at: Setting, config: ModelConfig, checkpointed: bool = False) -> BMojoLM:
    torch.manual_seed(0)
    model = BMojoLM(config).to(at.plan.device)
    model.gradient_checkpointing = checkpointed
    return model


def _model(
    at: Setting, name: str, config: ModelConfig, time: int, backward: bool, *, compiled: bool = False,
    checkpointed: bool = False,
) -> Contestant:  # fmt: skip
    """A model of ours on random tokens."""

    def build() -> Runner:
        model = _build(at, config, checkpointed)
        tokens = at.tokens(time + 1, config.vocab_size)
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        forward = partial(next_token_loss, model) if backward else lambda batch: model(batch["tokens"])
        if compiled:
            forward = torch.compile(forward)
        run = partial(_step if backward else _answer, at, model, partial(forward, batch))
        return Runner(run, parameters=_count(model))

    work = floor.model_work(config, at.batch, time, backward=backward)
    return Contestant(name, build, at.batch * time, work, compiled=compiled)


def _their_model(
    at: Setting, name: str, config: ModelConfig, family: str, attention: str | None = None, *, time: int, backward: bool
) -> Contestant:
    """A model of Transformers with the sizes of `config`, on the same tokens."""

    def build() -> Runner:
        if attention == "eager" and time > LONGEST_EAGER:
            raise Missing(f"its scores take the square of {time:,} tokens: at most {LONGEST_EAGER:,} here")
        torch.manual_seed(0)
        model = rivals.transformers_model(config, family, at.plan.device, attention)
        tokens = at.tokens(time, config.vocab_size)
        if backward:
            model.train()
            run = partial(_step, at, model, lambda: model(tokens, labels=tokens, use_cache=False).loss)
        else:
            model.eval()
            run = partial(_answer, at, model, lambda: model(tokens, use_cache=True))
        return Runner(run, parameters=_count(model))

    work = floor.model_work(config, at.batch, time, backward=backward)
    return Contestant(name, build, at.batch * time, work, rival=True)


def _step(at: Setting, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    with at.precision():
        value = loss()
    value.backward()
    model.zero_grad()


def _answer(at: Setting, model: nn.Module, forward: Callable[[], Any]) -> None:
    _without_gradients(at, forward)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# decoding
def decode(at: Setting) -> Iterator[Cell]:
    contexts = sorted(set(at.plan.contexts))
    for context in contexts:
        family = [_decoding(at, name, at.config(name), context) for name in _bmojo_first(at.plan.models)]
        llama, mamba2 = at.config("transformer"), at.twin("mamba2", intermediate_size=0)
        family.append(_their_decoding(at, "transformers, Llama", llama, "llama", context))
        yield at.cell("family", family, **{"pass": "decode"}, context=context)
        ours = _decoding(at, "bmojo", mamba2, context)
        theirs = _their_decoding(at, "transformers", mamba2, "mamba2", context)
        yield at.cell("mamba2", [ours, theirs], **{"pass": "decode"}, context=context)
    for context in contexts[1:]:
        pair = [_decoding(at, f"context {n:,}", at.config("bmojo"), n) for n in (contexts[0], context)]
        yield at.cell("growth", pair, **{"pass": "decode"}, context=contexts[0], longer=context)


def _decoding(at: Setting, name: str, config: ModelConfig, context: int) -> Contestant:
    """Greedy tokens, one by one, from the same state each time."""

    def build() -> Runner:
        if not presets.bounded(config):
            _require_short(context)
        model = _build(at, config).eval()
        held: list[MemoryState] = []
        with torch.inference_mode(), at.precision():
            (state,) = (state for _, state in states_at(model, [context]))
            state = state.repeat(at.batch)
        token = at.tokens(1, config.vocab_size)

        def prepare() -> None:
            held[:] = [state.clone()]

        @torch.inference_mode()
        def run() -> None:
            now, after = token, held.pop()
            with at.precision():
                for _ in range(DECODED):
                    logits, after = model(now, after, donate=True)
                    now = logits.argmax(-1)

        return Runner(run, prepare, _count(model), state.nbytes)

    work = floor.decode_work(config, context, DECODED, at.batch)
    return Contestant(name, build, at.batch * DECODED, work)


def _their_decoding(at: Setting, name: str, config: ModelConfig, family: str, context: int) -> Contestant:
    """The same by a model of Transformers, with its cache."""

    def build() -> Runner:
        _require_short(context)
        torch.manual_seed(0)
        model = rivals.transformers_model(config, family, at.plan.device).eval()
        kept = "past_key_values" if family == "llama" else "cache_params"
        with torch.inference_mode(), at.precision():
            cache = getattr(model(at.tokens(context, config.vocab_size), use_cache=True, logits_to_keep=1), kept)
        token, grows = at.tokens(1, config.vocab_size), family == "llama"

        @torch.inference_mode()
        def run() -> None:
            now = token
            with at.precision():
                for _ in range(DECODED):
                    now = model(now, use_cache=True, **{kept: cache}).logits.argmax(-1)

        @torch.inference_mode()
        def prepare() -> None:
            if grows and (beyond := cache.get_seq_length() - context):
                cache.crop(-beyond)

        return Runner(run, prepare, _count(model), rivals.state_bytes(cache))

    work = floor.decode_work(config, context, DECODED, at.batch)
    return Contestant(name, build, at.batch * DECODED, work, rival=True)


def _require_short(context: int) -> None:
    if context > LONGEST_READ:
        raise Missing(f"it would have to read {context:,} tokens at once: at most {LONGEST_READ:,} here")


# memory, streams, choices
def memory(at: Setting) -> Iterator[Cell]:
    for time in at.lengths:
        contestants = [
            _model(at, f"{name}, checkpointed" if again else name, at.config(name), time, True, checkpointed=again)
            for name in ("bmojo", "mamba2", "transformer")
            for again in (False, True)
        ]
        yield at.cell("training", contestants, **{"pass": PASSES[True]}, time=time)
        loss = _cross_entropy(at, time, True, PAPER_VOCABULARY)
        yield at.cell("cross_entropy", loss, **{"pass": PASSES[True]}, time=time, vocab_size=PAPER_VOCABULARY)


def stream(at: Setting) -> Iterator[Cell]:
    cell = at.cell("bmojo", (), **{"pass": "forward"}, tokens=at.plan.stream_tokens)
    yield Cell(cell.suite, cell.case, cell.settings, stream=at.config("bmojo"))


def choices(at: Setting) -> Iterator[Cell]:
    for time in at.lengths:
        configs = {name: at.config("bmojo", **changes) for name, changes in CHOICES.items()}
        training = [_model(at, name, config, time, True) for name, config in configs.items()]
        yield at.cell("training", training, **{"pass": PASSES[True]}, time=time)
        tokens = [_decoding(at, name, config, time) for name, config in configs.items()]
        yield at.cell("decoding", tokens, **{"pass": "decode"}, context=time)


SUITES: dict[str, Callable[[Setting], Iterator[Cell]]] = {
    cells.__name__: cells for cells in (stream, ops, layers, train, prefill, decode, memory, choices)
}
