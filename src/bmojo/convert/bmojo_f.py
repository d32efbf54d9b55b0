"""The B'MOJO-F of the paper's authors (Hybrid Model Factory): Llama, Qwen2 and Qwen3 stacks in which
`hybrid_override_pattern` names the mixer of every layer.

    *    attention over the whole past        M2   Mamba-2
    SWA  attention over a window              GDN  gated delta net
    BMF  window and fading tokens             GKA  Gated KalmaNet: not in this family

Their state-space layers give every query head its own group: keys (B) and values (x) are computed for the key-value
heads alone and repeated. Ours have a row for each head, so those rows are copies (`Rule.rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.convert.attention import FORMATS as STACKS
from bmojo.convert.blocks import attention, mamba2, same
from bmojo.convert.mapping import Format, Reading, Rule, inner_eps, layer_kinds, layers

KINDS = {"*": "full", "SWA": "attention", "BMF": "bmojo", "M2": "ssm", "GDN": "ssm"}
UNKNOWN = {"GKA": "Gated KalmaNet", "GDN>GKA": "a layer of two mixers", "*DA": "attention on two streams"}
MIXERS = {"mamba2": "ssd", "gdn": "gdn", "gated_deltanet": "gdn"}
INNER_EPS = 1e-5  # of the norm inside their state-space layers
WINDOW = 2048
_OVERRIDDEN = ("layer_types", "use_sliding_window")  # by hybrid_override_pattern
_GDN = {
    "use_gate": True,
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "conv_bias": False,
    "kv_proj_rank": None,
    "kv_learnable_residual": False,
}


def _reader(base: Format) -> Callable[[Reading, dict[str, Any]], dict[str, Any]]:
    def read(reading: Reading, ours: dict[str, Any]) -> dict[str, Any]:
        stack = {name: value for name, value in reading.settings.items() if name not in _OVERRIDDEN}
        ours = ours | base.read_layers(Reading(stack, None, reading.reasons), ours)
        names = str(reading.get("hybrid_override_pattern")).split("-")
        if len(names) != ours["num_layers"]:
            reading.refuse(
                f"hybrid_override_pattern names {len(names)} layers of num_hidden_layers={ours['num_layers']}"
            )
        for name in sorted(set(names) - KINDS.keys()):
            what = UNKNOWN.get(name, "a layer of the distillation stage" if name.endswith("*") else "an unknown layer")
            reading.refuse(f"hybrid_override_pattern has {name!r} ({what})")
        bmojo = reading.section("bmojo_config") if "BMF" in names else Reading({})
        window = _window(reading, names, bmojo.count("window_size", WINDOW))
        more = {
            **layers([KINDS.get(name, "full") for name in names], window),
            "tie_sources": bmojo.get("tie_attn_weights", True),
            "fading_span": window if "BMF" in names else 0,
        }
        head_dim = ours["head_dim"] or ours["hidden_size"] // ours["num_heads"]
        if "BMF" in names and not ours.get("qk_norm") and head_dim != ours["hidden_size"] // ours["num_heads"]:
            reading.refuse(f"head_dim={head_dim}: their softmax takes hidden_size / num_attention_heads for its scale")
        return ours | more | _ssm(reading, ours | more, names, str(bmojo.get("ssm_mixer", "mamba2")))

    return read


def _window(reading: Reading, names: list[str], bmojo_window: int) -> int | None:
    """The one window of all layers that have any."""
    bmojo = bmojo_window if "BMF" in names else None
    swa = reading.section("swa_config").count("window_size") if "SWA" in names else None
    if bmojo and swa and bmojo != swa and reading.window is None:
        reading.refuse(
            f"its layers have different windows (SWA: {swa}, BMF: {bmojo}), ours have one; force window={bmojo} on all"
        )
    return bmojo or swa


def _ssm(reading: Reading, ours: dict[str, Any], names: list[str], mixer: str) -> dict[str, Any]:
    """The settings of the state-space layers, which follow from those of the attention layers."""
    used = {"M2": "ssd", "GDN": "gdn"}
    found = {used[name] for name in names if name in used}
    if "BMF" in names:
        if mixer.lower() not in MIXERS:
            what = "an unknown mixer" if mixer.lower() not in ("gka", "gated_kalmanet") else UNKNOWN["GKA"]
            reading.refuse(f"ssm_mixer={mixer!r} ({what})")
        found.add(MIXERS.get(mixer.lower(), "ssd"))
    if len(found) > 1:
        reading.refuse("its layers have both Mamba-2 and gated delta mixers; a model of ours has one")
    if not found or reading.reasons:
        return {}
    heads, hidden = ours["num_heads"], ours["hidden_size"]
    head_dim = ours["head_dim"] or hidden // heads
    if heads * head_dim % hidden:
        reading.refuse(f"num_attention_heads * head_dim = {heads * head_dim} is no multiple of hidden_size={hidden}")
    ssm = found.pop()
    eps = INNER_EPS
    if ssm == "gdn":
        gdn = reading.section("gdn_config")
        for name, value in _GDN.items():
            if gdn.get(name, value) != value:
                reading.refuse(f"gdn_config: {name}={gdn.get(name)!r}; only {value!r} can be held")
        eps, conv = gdn.number("norm_eps", INNER_EPS), gdn.count("conv_size", 4)
    else:
        mamba, conv = reading.section("mamba2_config"), 4
        if ours.get("qk_norm") and mamba.get("use_qk_norm", True):
            reading.refuse("mamba2_config: use_qk_norm (norms of B and C before their convolution)")
        if mamba.get("use_pos_emb", False):
            reading.refuse("mamba2_config: use_pos_emb (rotary positions of B and C)")
    return {
        "ssm": ssm,
        "ssm_expand": heads * head_dim // hidden,
        "ssm_head_dim": head_dim,
        "ssm_state_size": head_dim,
        "ssm_groups": heads,
        "ssm_conv": conv,
        "ssm_norm_eps": None if eps == ours["norm_eps"] else eps,
    }


def _writer(base: Format) -> Callable[[ModelConfig], dict[str, Any]]:
    def write(config: ModelConfig) -> dict[str, Any]:
        names = {
            "full": "*",
            "attention": "SWA",
            "ssm": "M2" if config.ssm == "ssd" else "GDN",
            "bmojo": "BMF",
        }
        theirs = base.write_layers(config.replace(window=None, pattern=["attention"], fading_span=0, eidetic_slots=0))
        theirs.pop("layer_types", None)
        theirs["hybrid_override_pattern"] = "-".join(names[kind] for kind in layer_kinds(config))
        if config.window is not None:
            theirs["swa_config"] = {"window_size": config.window}
            theirs["bmojo_config"] = {
                "window_size": config.window,
                "tie_attn_weights": config.tie_sources,
                "ssm_mixer": "mamba2" if config.ssm == "ssd" else "gdn",
            }
        theirs["mamba2_config"] = {"use_qk_norm": False, "use_pos_emb": False}
        theirs["gdn_config"] = {**_GDN, "norm_eps": inner_eps(config), "conv_size": config.ssm_conv}
        return theirs

    return write


def _repeated(config: ModelConfig) -> Tensor:
    """Rows of the key-value heads, as every query head reads them."""
    rows = torch.arange(config.num_kv_heads * config.head_dim).view(config.num_kv_heads, -1)
    return rows.repeat_interleave(config.num_heads // config.num_kv_heads, 0).flatten()


def _stacked(*parts: Tensor) -> Tensor:
    """Rows of matrices that lie one under the other; each part names rows of its own matrix, of which it uses all."""
    start, rows = 0, []
    for part in parts:
        rows.append(part + start)
        start += int(part.max()) + 1
    return torch.cat(rows)


def _mamba2(config: ModelConfig, theirs: str) -> Iterator[Rule]:
    every, shared = torch.arange(config.ssm_size), _repeated(config)
    kv = config.num_kv_heads * config.head_dim
    conv = kv + kv + config.ssm_size
    channels = _stacked(shared, shared, every)  # x, B, C
    rows = _stacked(every, channels, torch.arange(config.num_heads))  # z, then those, then dt
    for rule in mamba2(config, theirs):
        (name, _), *_ = rule.theirs
        match rule.ours:
            case "ssm.in_proj.weight":
                shape = (config.ssm_size + conv + config.num_heads, config.hidden_size)
                yield Rule(rule.ours, ((name, shape),), rows)
            case "ssm.conv.weight":
                yield Rule(rule.ours, ((name, (conv, 1, config.ssm_conv)),), channels)
            case "ssm.conv.bias":
                yield Rule(rule.ours, ((name, (conv,)),), channels)
            case _:
                yield rule


def _gdn(config: ModelConfig, theirs: str) -> Iterator[Rule]:
    every, shared, heads = torch.arange(config.ssm_size), _repeated(config), torch.arange(config.num_heads)
    kv = config.num_kv_heads * config.head_dim
    sizes = {
        "q": config.ssm_size,
        "k": kv,
        "v": kv,
        "g": config.ssm_size,
        "b": config.num_heads,
        "gk": config.num_heads,
    }
    yield Rule(
        "ssm.in_proj.weight",
        tuple((f"{theirs}.{name}_proj.weight", (size, config.hidden_size)) for name, size in sizes.items()),
        _stacked(every, shared, shared, every, heads, heads),
    )
    yield Rule(
        "ssm.conv.weight",
        tuple((f"{theirs}.{name}_conv1d.weight", (sizes[name], 1, config.ssm_conv)) for name in "qkv"),
        _stacked(every, shared, shared),
    )
    for ours, name in (("A_log", "A_log"), ("dt_bias", "dt_bias"), ("norm.weight", "o_norm.weight")):
        yield same(f"ssm.{ours}", f"{theirs}.{name}")
    yield same("ssm.out_proj.weight", f"{theirs}.o_proj.weight")


def _fading_mixer(config: ModelConfig, prefix: str = "") -> Iterator[Rule]:
    yield from _mamba2(config, f"{prefix}mamba") if config.ssm == "ssd" else _gdn(config, f"{prefix}gdn")


def _bmojo(config: ModelConfig) -> Iterator[Rule]:
    yield from _fading_mixer(config, "bmojo_f.")
    for rule in attention(config, "bmojo_f.bmojo_attn"):
        yield rule
        (name, shape), *_ = rule.theirs
        if not config.tie_sources and not rule.ours.startswith("o_"):
            head, _, tail = name.rpartition(".")
            yield Rule(f"fading_{rule.ours}", ((f"{head}_.{tail}", shape),))


def _format(base: Format) -> Format:
    return Format(
        f"hybrid_{base.name}",
        f"Hybrid{base.architecture}",
        names=base.names,
        fields=base.fields,
        fixed=base.fixed,
        read_layers=_reader(base),
        write_layers=_writer(base),
        mixers={
            "full": attention,
            "attention": lambda config: attention(config, "swa"),
            "ssm": _fading_mixer,
            "bmojo": _bmojo,
        },
    )


FORMATS = tuple(_format(base) for base in STACKS if base.name != "mistral")
