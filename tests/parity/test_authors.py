"""B'MOJO-F as its authors compute it: two softmaxes, merged by their log-sum-exps.

A reference that shares no code with the library, written from the paper's section on B'MOJO-F and from the layout of
the authors' public code (paths over x and over y, the second delayed by the window; rotary positions of each token's
own; untied: a query of its own for the fading path). It takes a checkpoint in their names and shapes, random here, so
that the converter is tested along: in it the keys and values of state-space layers come for the key-value heads alone.

    o_i = (e^a A_i + e^b B_i) / (e^a + e^b)
    A_i, a    softmax of q_i over k_j, j in (i-W, i], and its log-sum-exp
    B_i, b    softmax of q'_i over k'_j of y_j, j in (i-2W, i-W], and its log-sum-exp: -inf where there is none
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import VOCAB, draw_tokens
from torch import Tensor
from twins import Outcome, agree, compare, one_by_one, run_ours

from bmojo.config import ModelConfig
from bmojo.convert import FORMATS, export_model, import_model
from bmojo.nn.model import BMojoLM

Weights = dict[str, Tensor]
W, THETA, HEADS, KV_HEADS, P, HIDDEN = 5, 100.0, 4, 2, 4, 16
INNER_EPS = 1e-5  # of the norm inside their state-space layers, whatever that of the others is


def settings(base: str, pattern: str, mixer: str, tied: bool, **more: Any) -> dict[str, Any]:
    return {
        "model_type": f"hybrid_{base}",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": pattern.count("-") + 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": P,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "hybrid_override_pattern": pattern,
        "layer_types": pattern.split("-"),
        "bmojo_config": {"window_size": W, "tie_attn_weights": tied, "ssm_mixer": mixer, "hidden_size": HIDDEN},
        "swa_config": {"window_size": W},
        "mamba2_config": {"use_qk_norm": False, "use_pos_emb": False},
        "gdn_config": {"norm_eps": INNER_EPS, "conv_size": 4},
        **more,
    }


def random_checkpoint(config: dict[str, Any], seed: int = 0) -> Weights:
    """Every tensor that their classes make for these settings, by name and shape."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)
    }  # fmt: skip
    wide, kv, base = HEADS * P, KV_HEADS * P, config["model_type"].removeprefix("hybrid_")
    mamba2 = {
        "in_proj.weight": (2 * wide + 2 * kv + HEADS, HIDDEN), "conv1d.weight": (wide + 2 * kv, 1, 4),
        "conv1d.bias": (wide + 2 * kv,), "dt_bias": (HEADS,), "A_log": (HEADS,), "D": (HEADS,),
        "norm.weight": (wide,), "out_proj.weight": (HIDDEN, wide),
    }  # fmt: skip
    gdn = {
        "q_proj.weight": (wide, HIDDEN), "k_proj.weight": (kv, HIDDEN), "v_proj.weight": (kv, HIDDEN),
        "b_proj.weight": (HEADS, HIDDEN), "gk_proj.weight": (HEADS, HIDDEN), "g_proj.weight": (wide, HIDDEN),
        "A_log": (HEADS,), "dt_bias": (HEADS,), "q_conv1d.weight": (wide, 1, 4), "k_conv1d.weight": (kv, 1, 4),
        "v_conv1d.weight": (kv, 1, 4), "o_norm.weight": (P,), "o_proj.weight": (HIDDEN, wide),
    }  # fmt: skip

    def attention(*suffixes: str) -> dict[str, tuple[int, ...]]:
        own = {"o_proj.weight": (HIDDEN, wide)}
        for end in suffixes:
            for name, size in (("q", wide), ("k", kv), ("v", kv)):
                own[f"{name}_proj{end}.weight"] = (size, HIDDEN)
                if base == "qwen2":
                    own[f"{name}_proj{end}.bias"] = (size,)
            if base == "qwen3":
                own |= {f"q_norm{end}.weight": (P,), f"k_norm{end}.weight": (P,)}
        return own

    bmojo = config["bmojo_config"]
    fading = {"mamba2": ("mamba", mamba2), "gdn": ("gdn", gdn)}[bmojo["ssm_mixer"]]
    layers = {
        "*": {"self_attn": attention("")},
        "SWA": {"swa": attention("")},
        "M2": {"mamba": mamba2},
        "GDN": {"gdn": gdn},
        "BMF": {
            "bmojo_f.bmojo_attn": attention("") if bmojo["tie_attn_weights"] else attention("", "_"),
            f"bmojo_f.{fading[0]}": fading[1],
        },
    }
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}"
        for module, tensors in layers[kind].items():
            shapes |= {f"{layer}.{module}.{name}": shape for name, shape in tensors.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (HIDDEN,)
        for name in ("gate", "up"):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (24, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, 24)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        is_scale = name.endswith(("norm.weight", ".D"))
        weights[name] = 1 + 0.3 * noise if is_scale else noise * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        weights[name].requires_grad_()
    return weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x: Tensor) -> Tensor:
    """x [T, heads, P], each row turned by its own position."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=x.dtype)[:, None, None] * THETA ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    size = weight.shape[-1]
    padded = F.pad(x, (0, 0, size - 1, 0))
    return F.silu(sum(padded[j : j + len(x)] * weight[:, 0, j] for j in range(size)) + bias)


def mamba2_layer(w: Weights, u: Tensor) -> Tensor:
    wide, kv = HEADS * P, KV_HEADS * P
    z, xBC, dt = (u @ w["in_proj.weight"].T).split((wide, 2 * kv + wide, HEADS), -1)
    x, B, C = short_conv(xBC, w["conv1d.weight"], w["conv1d.bias"]).split((kv, kv, wide), -1)
    x, B = (part.view(-1, KV_HEADS, P).repeat_interleave(HEADS // KV_HEADS, 1) for part in (x, B))
    C, dt = C.view(-1, HEADS, P), F.softplus(dt + w["dt_bias"])
    h, ys = torch.zeros(HEADS, P, P, dtype=u.dtype), []
    for t in range(len(u)):
        decay = (-w["A_log"].exp() * dt[t]).exp()
        h = h * decay[:, None, None] + dt[t][:, None, None] * B[t][:, :, None] * x[t][:, None, :]
        ys.append((C[t][:, None, :] @ h).squeeze(1) + w["D"][:, None] * x[t])
    gated = torch.stack(ys) * F.silu(z.view(-1, HEADS, P))
    normed = rms_norm(gated, w["norm.weight"].view(HEADS, P), INNER_EPS)  # a norm for every head
    return normed.flatten(1) @ w["out_proj.weight"].T


def gdn_layer(w: Weights, u: Tensor) -> Tensor:
    q, k, v = (short_conv(u @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]) for n in "qkv")
    k, v = (part.view(-1, KV_HEADS, P).repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q.view(-1, HEADS, P), k))
    beta = (u @ w["b_proj.weight"].T).sigmoid()
    g = -w["A_log"].exp() * F.softplus(u @ w["gk_proj.weight"].T + w["dt_bias"])
    S, out = torch.zeros(HEADS, P, P, dtype=u.dtype), []
    for t in range(len(u)):
        S = S * g[t].exp()[:, None, None]
        error = beta[t][:, None] * (v[t] - (k[t][:, None, :] @ S).squeeze(1))
        S = S + k[t][:, :, None] * error[:, None, :]
        out.append((q[t][:, None, :] @ S).squeeze(1) / math.sqrt(P))
    z = (u @ w["g_proj.weight"].T).view(-1, HEADS, P)
    return (rms_norm(torch.stack(out), w["o_norm.weight"], INNER_EPS) * F.silu(z)).flatten(1) @ w["o_proj.weight"].T


def path(
    w: Weights, x: Tensor, source: Tensor, first: int, last: int, *, eps: float, end: str = ""
) -> tuple[Tensor, Tensor]:
    """Softmax of every query over the keys of `source` at i-first .. i-last [T, heads, P]; log-sum-exp [T, heads]."""

    def heads(z: Tensor, name: str) -> Tensor:
        out = (z @ w[f"{name}_proj{end}.weight"].T + w.get(f"{name}_proj{end}.bias", 0)).view(len(z), -1, P)
        norm = w.get(f"{name}_norm{end}.weight")
        return out if norm is None else rms_norm(out, norm, eps)

    q, k, v = rotary(heads(x, "q")), rotary(heads(source, "k")), heads(source, "v")
    k, v = (z.repeat_interleave(HEADS // KV_HEADS, 1) for z in (k, v))
    outputs, sums = [], []
    for i in range(len(x)):
        seen = slice(max(0, i - first), max(0, i - last + 1))
        scores = torch.einsum("hp,jhp->hj", q[i], k[seen]) / math.sqrt(P)
        sums.append(scores.logsumexp(-1))  # of nothing: -inf
        outputs.append(torch.einsum("hj,jhp->hp", scores.softmax(-1), v[seen]))
    return torch.stack(outputs), torch.stack(sums)


def bmojo_layer(w: Weights, x: Tensor, y: Tensor, tied: bool, eps: float) -> Tensor:
    near, a = path(w, x, x, W - 1, 0, eps=eps)
    far, b = path(w, x, y, 2 * W - 1, W, eps=eps, end="" if tied else "_")
    top = torch.maximum(a, b)
    ea, eb = (a - top).exp()[..., None], (b - top).exp()[..., None]
    return ((ea * near + eb * far) / (ea + eb)).flatten(1) @ w["o_proj.weight"].T


def reference(config: dict[str, Any], weights: Weights, tokens: Tensor) -> Tensor:
    """Logits [T, vocabulary] of one row of tokens."""

    def under(prefix: str) -> Weights:
        return {name.removeprefix(prefix): z for name, z in weights.items() if name.startswith(prefix)}

    x, bmojo, eps = weights["model.embed_tokens.weight"][tokens], config["bmojo_config"], config["rms_norm_eps"]
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        u = rms_norm(x, weights[f"{layer}input_layernorm.weight"], eps)
        if kind == "BMF":
            name, mixer = {"mamba2": ("mamba", mamba2_layer), "gdn": ("gdn", gdn_layer)}[bmojo["ssm_mixer"]]
            y = mixer(under(f"{layer}bmojo_f.{name}."), u)
            x = x + bmojo_layer(under(f"{layer}bmojo_f.bmojo_attn."), u, y, bmojo["tie_attn_weights"], eps)
        elif kind == "M2":
            x = x + mamba2_layer(under(f"{layer}mamba."), u)
        elif kind == "GDN":
            x = x + gdn_layer(under(f"{layer}gdn."), u)
        else:
            name, reach = ("self_attn", len(tokens)) if kind == "*" else ("swa", W)
            own = under(f"{layer}{name}.")
            x = x + path(own, u, u, reach - 1, 0, eps=eps)[0].flatten(1) @ own["o_proj.weight"].T
        u = rms_norm(x, weights[f"{layer}post_attention_layernorm.weight"], eps)
        own = under(f"{layer}mlp.")
        x = x + (F.silu(u @ own["gate_proj.weight"].T) * (u @ own["up_proj.weight"].T)) @ own["down_proj.weight"].T
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def run_reference(config: dict[str, Any], weights: Weights, tokens: Tensor) -> Outcome:
    logits = torch.stack([reference(config, weights, row) for row in tokens])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return Outcome(logits.detach(), loss.detach(), {name: z.grad for name, z in weights.items()})


def check(config: dict[str, Any]) -> ModelConfig:
    """Logits, loss, gradients and decoding of the converted model; and the way back."""
    weights, tokens = random_checkpoint(config), draw_tokens(2, 3 * W + 4)
    with torch.no_grad():
        our_config, tensors = import_model(config, weights)
    ours = BMojoLM(our_config).double()
    ours.load_state_dict(tensors)
    expected = run_reference(config, weights, tokens)
    agree(one_by_one(ours, tokens), expected.logits, "logits, one token at a time")
    got = run_ours(ours, tokens)
    # where our heads hold copies of one row of theirs, its gradient is the sum of ours
    for rule in FORMATS[config["model_type"]].rules(our_config):
        whole = got.gradients.pop(rule.ours)
        rows = torch.arange(len(whole)) if rule.rows is None else rule.rows
        summed = whole.new_zeros(int(rows.max()) + 1, *whole.shape[1:]).index_add(0, rows, whole)
        for name, _ in rule.theirs:
            theirs = expected.gradients[name]
            size = theirs.numel() // whole[0].numel()
            got.gradients[name], summed = summed[:size].reshape(theirs.shape), summed[size:]
    compare(got, expected)
    back, written = export_model(config["model_type"], our_config, tensors)
    assert import_model(back, written)[0] == our_config
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    return our_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", ["mamba2", "gdn"])
@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3"])
def test_bmojo_f_is_theirs(base, mixer, tied):
    check(settings(base, "BMF-BMF", mixer, tied))


@pytest.mark.parametrize(
    ("pattern", "mixer"), [("SWA-BMF-BMF", "mamba2"), ("M2-BMF-SWA", "mamba2"), ("GDN-BMF", "gdn")]
)
def test_its_other_layers_too(pattern, mixer):
    check(settings("llama", pattern, mixer, True))


@pytest.mark.parametrize(("pattern", "mixer"), [("*-M2", "mamba2"), ("GDN-*-GDN-*", "gdn"), ("M2-SWA", "mamba2")])
def test_hybrids_without_fading_tokens(pattern, mixer):
    check(settings("qwen2", pattern, mixer, True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("base", "mixer"), [("llama", "mamba2"), ("qwen2", "mamba2"), ("qwen3", "gdn")])
def test_half_of_the_layers_over_the_whole_past(base, mixer, tied):
    """Their published recipes, with the epsilon of the base model."""
    eps = 1e-5 if base == "llama" else 1e-6
    config = check(settings(base, "*-BMF-*-BMF", mixer, tied, rms_norm_eps=eps))
    assert config.pattern == ("full", "bmojo")
    assert config.window == W
    assert (config.norm_eps, config.ssm_norm_eps) == (eps, None if eps == INNER_EPS else INNER_EPS)


def test_the_whole_past_beside_both_windows():
    assert check(settings("qwen2", "SWA-*-BMF", "mamba2", True)).pattern == ("attention", "full", "bmojo")


def test_a_window_that_is_forced_on_the_whole_past():
    """The weights are those of `SWA` layers under another name."""
    whole = settings("llama", "*-BMF", "mamba2", True)
    weights = random_checkpoint(whole)
    renamed = {name.replace("self_attn", "swa"): z for name, z in weights.items()}
    config, tensors = import_model(whole, weights, window=W)
    expected, same = import_model(settings("llama", "SWA-BMF", "mamba2", True), renamed)
    assert config == expected
    assert tensors.keys() == same.keys()
    assert all(torch.equal(tensors[name], same[name]) for name in same)
