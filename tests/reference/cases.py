"""What the tests of the core share: drawn configurations, models with no trivial weight, comparisons."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bmojo import presets
from bmojo.config import INNOVATIONS, ModelConfig
from bmojo.memory.state import MemoryState
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM

EXACT = 1e-10
VOCAB = 13
# the families of layers; an innovation stands for a bmojo layer that has it
FAMILIES = ("attention", "full attention", "ssd", "gdn", "s6", "bmojo without slots", *INNOVATIONS)


@st.composite
def configs(draw: st.DrawFn, family: str, layers: int = 2) -> ModelConfig:
    """A tiny configuration of a family, any other option drawn."""

    def of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    chunk = of(4, 1, 2, 3, 5)
    heads, kv_heads = of((2, 2), (1, 1), (2, 1), (4, 2))
    expand, ssm_head_dim = of((1, 4), (1, 8), (2, 4))
    ssm_heads = expand * 8 // ssm_head_dim
    fields: dict[str, Any] = {
        "pattern": ("bmojo",),
        "window": chunk * of(1, 2, 3),
        "chunk_size": chunk,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": of(4, 2),
        "qkv_bias": of(False, True),
        "qk_norm": of(False, True),
        "conv_size": of(0, 3, 1, 4),
        "rope_theta": of(10000.0, 100.0),
        "ssm": of("ssd", "gdn", "s6"),
        "ssm_expand": expand,
        "ssm_head_dim": ssm_head_dim,
        "ssm_state_size": of(3, 1, 4),
        "ssm_dt_rank": of(0, 3),
        "ssm_groups": of(*(g for g in (1, 2, ssm_heads) if ssm_heads % g == 0)),
        "ssm_conv": of(4, 1, 2),
        "ssm_norm_eps": of(None, 1e-3),
    }
    match family:
        case "attention":
            fields["pattern"] = ("attention",)
        case "full attention":
            fields |= {"pattern": of(("attention",), ("ssm", "attention"))[-layers:], "window": None}
        case "ssd" | "gdn" | "s6":
            fields |= {"pattern": of(("ssm",), ("attention", "ssm"))[-layers:], "ssm": family}
        case _:
            fields |= {
                "tie_sources": of(True, False),
                "fading": of("window", "summary"),
                "fading_span": chunk * of(2, 0, 1),
                "positions": of("true", "compact"),
            }
    if family in INNOVATIONS:
        fields |= {
            "innovation": family,
            "eidetic_slots": of(4, 1, 9),
            "innovation_dim": of(3, 8, 20),
            "innovation_forgetting": of(0.995, 0.8),
            "eidetic_threshold": of(0.0, 0.4),
            "eidetic_decay": of(1.0, 0.93),
            "admission": of("innovation", "learned"),
        }
        if layers > 1:
            fields["pattern"] = of(("bmojo",), ("ssm", "bmojo"), ("bmojo", "attention"), ("full", "bmojo"))
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_layers=layers,
        intermediate_size=of(8, 0),
        tie_embeddings=of(True, False),
        **fields,
    )


def any_config(layers: int = 2) -> st.SearchStrategy[ModelConfig]:
    return st.sampled_from(FAMILIES).flatmap(lambda family: configs(family, layers))


@st.composite
def storage_configs(draw: st.DrawFn, layers: int = 2) -> ModelConfig:
    """A tiny configuration some of whose layers have storage."""
    config = draw(configs(draw(st.sampled_from(("attention", "bmojo without slots", *INNOVATIONS))), layers))
    chunk, window = config.chunk_size, config.window
    assert window is not None

    def of(*values: int) -> Any:
        return draw(st.sampled_from(values))

    sizes = [n for n in range(1, window + 1) if chunk % n == 0 or n % chunk == 0]
    block, stride = of(*sizes), of(*(n for n in range(1, chunk + 1) if chunk % n == 0))
    reading = [i for i, kind in enumerate(config.kinds) if kind in ("attention", "bmojo")]
    return config.replace(
        storage_layers=draw(st.sampled_from([reading, reading[-1:]])),
        storage_block=block,
        storage_stride=stride,
        storage_keys=draw(st.integers(1, min(3, block))),
        storage_queries=draw(st.integers(1, chunk)),
        storage_blocks=of(1, 2, 5),
        positions=draw(st.sampled_from(["true", "compact"])),
    )


def simplest(family: str, **changes: Any) -> ModelConfig:
    """The simplest configuration of a family: one layer, chunks and window of 4."""
    fields: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 8, "num_heads": 2, "chunk_size": 4, "window": 4,
                              "ssm_head_dim": 4, "num_layers": 1}  # fmt: skip
    match family:
        case "attention" | "full attention":
            fields |= {"pattern": ("attention",), "window": 4 if family == "attention" else None}
        case "ssd" | "gdn" | "s6":
            fields |= {"pattern": ("ssm",), "ssm": family}
        case _:
            slots = 0 if family == "bmojo without slots" else 3
            fields |= {"fading_span": 4, "eidetic_slots": slots, "innovation": family if slots else "rls"}
    return ModelConfig(**{**fields, **changes})


def small_preset(name: str, **changes: Any) -> ModelConfig:
    """The preset, with chunks of 4 and windows of 8."""
    fields: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_heads": 2, "num_layers": 2, "chunk_size": 4,
                              "ssm_head_dim": 8, "ssm_state_size": 4, "intermediate_size": 16}  # fmt: skip
    if name in ("swa", "hybrid", "bmojo_f", "bmojo"):
        fields["window"] = 8
    if name == "bmojo":
        fields["eidetic_slots"] = 5
    return presets.get(name, "tiny", **{**fields, **changes})


def shaken(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module with noise on every parameter, so that norms, biases and D matter; and memories that last."""
    generator = torch.Generator().manual_seed(seed)
    module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if name.endswith("A_log"):
                parameter.copy_(noise - 2)
            elif name.endswith("dt_bias"):
                parameter.copy_(noise - 1)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return module


def make_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> BMojoLM:
    return shaken(BMojoLM(config), seed, dtype)  # type: ignore[return-value]


def draw_tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def partitions(time: int) -> st.SearchStrategy[list[int]]:
    """Lengths of calls that sum to `time`."""
    cuts = st.sets(st.integers(1, time - 1), max_size=5) if time > 1 else st.just(set())

    def lengths(inner: set[int]) -> list[int]:
        at = [0, *sorted(inner), time]
        return [b - a for a, b in itertools.pairwise(at)]

    return cuts.map(lengths)


def run_calls(
    model: BMojoLM, tokens: Tensor, lengths: list[int], state: MemoryState | None = None, *, donate: bool = False,
    **by_token: Tensor,
) -> tuple[Tensor, MemoryState, Trace]:  # fmt: skip
    """Logits and final state of a sequence cut into calls; `by_token`: mask, document_ids. One trace."""
    logits, at, whole = [], 0, Trace()
    for length in lengths:
        part = slice(at, at + length)
        trace = Trace()
        out, state = model(
            tokens[:, part], state, donate=donate, trace=trace, **{name: z[:, part] for name, z in by_token.items()}
        )
        logits.append(out)
        whole.kept = trace.kept
        whole.innovation = (
            [torch.cat(z, 1) for z in zip(whole.innovation, trace.innovation, strict=True)] if at else trace.innovation
        )
        at += length
    assert state is not None
    return torch.cat(logits, 1), state, whole


def close(got: Tensor, expected: Tensor, tolerance: float = EXACT, message: str = "") -> None:
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, check_dtype=False, msg=lambda text: f"{message}: {text}"
    )


def canonical(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's state without what no query can see: empty slots, and a cache beyond its last token."""
    layer = dict(layer)
    if "slot_position" in layer:
        empty = layer["slot_position"] < 0
        for name in ("slot_k", "slot_v", "slot_score"):
            layer[name] = layer[name].masked_fill(empty.view(*empty.shape, *(1,) * (layer[name].ndim - 2)), 0)
    return layer


def same_state(got: MemoryState, expected: MemoryState, tolerance: float = EXACT, skip: tuple[str, ...] = ()) -> None:
    for i, (a, b, kind) in enumerate(zip(got.layers, expected.layers, got.config.kinds, strict=True)):
        a, b = canonical(a), canonical(b)
        assert a.keys() == b.keys()
        for name in a.keys() - set(skip):
            x, y = a[name], b[name]
            if name in ("k", "v") and got.config.window_of(kind) is None:
                length = int(b["position"].max())
                seen = (torch.arange(length) < b["position"][:, None])[..., None, None]
                x, y = x[:, :length] * seen, y[:, :length] * seen
            close(x, y, tolerance, f"state of layer {i}, {name}")
