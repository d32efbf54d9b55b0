"""One mixer layer, query by query, in float64 numpy: the definition of `bmojo.nn.mixer`, written a second time; with
what it reads from storage, that of `bmojo.memory.storage`; and a whole model of such layers.

It takes the weights of a `Mixer` and shares no code with it but the hash behind `innovation="random"`. One row, one
document, no padding, no state, no RMSNorm before the layer. Shapes: x [T, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from bmojo.nn.mixer import Mixer
from bmojo.nn.model import BMojoLM
from bmojo.ops.innovation import position_score

RIDGE = 0.1
Array = np.ndarray


@dataclass
class Reading:
    """What the layer gives, and what it remembered."""

    output: Array  # [T, D]
    scores: Array | None = None  # [T]
    sets: list[list[int]] = field(default_factory=list)  # the eidetic set of every chunk, and of the end
    blocks: list[Stored] = field(default_factory=list)  # what it hands over, the last one short if T is no multiple


@dataclass
class Stored:
    """A block of tokens: k, v [n, kv_heads, P], keys not turned; keys [r, kv_heads, P], turned by their place."""

    start: int
    k: Array
    v: Array
    keys: Array


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2) + eps) * weight


def causal_conv(x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
    """y_t = sum_j w_j x_{t-j}; the last column of the weight is w_0."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(min(t + 1, weight.shape[1])):
            out[t] += weight[:, -1 - j] * x[t - j]
    return out + bias


def rotary(x: Array, position: int, theta: float) -> Array:
    """Turn the pairs (x_m, x_{m + P/2}) by position * theta^(-2m/P)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for m in range(half):
        angle = position * theta ** (-2 * m / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[m], out[m + half] = x[m] * c - x[m + half] * s, x[m + half] * c + x[m] * s
    return out


def ssd(config, w: dict[str, Array], u: Array) -> tuple[Array, Array]:
    """Fading tokens [T, D], and the `state` innovation [T]."""
    size, heads, P = config.ssm_size, config.ssm_heads, config.ssm_head_dim
    groups, N = config.ssm_groups, config.ssm_state_size
    projected = u @ w["in_proj.weight"].T
    z, xBC, dt = np.split(projected, [size, 2 * size + 2 * groups * N], axis=1)
    xBC = silu(causal_conv(xBC, w["conv.weight"], w["conv.bias"]))
    h = np.zeros((heads, N, P))
    ys, errors = [], []
    for t in range(len(u)):
        x = xBC[t, :size].reshape(heads, P)
        B = xBC[t, size : size + groups * N].reshape(groups, N)
        C = xBC[t, size + groups * N :].reshape(groups, N)
        y, error = np.zeros((heads, P)), 0.0
        for n in range(heads):
            g = n // (heads // groups)
            predicted = B[g] @ h[n] / (B[g] @ B[g])
            error += np.sum((x[n] - predicted) ** 2) / np.sum(x[n] ** 2) / heads
            step = softplus(dt[t, n] + w["dt_bias"][n])
            h[n] = math.exp(-step * math.exp(w["A_log"][n])) * h[n] + step * np.outer(B[g], x[n])
            y[n] = C[g] @ h[n] + w["D"][n] * x[n]
        gated = y.reshape(-1) * silu(z[t])
        parts = zip(np.split(gated, groups), np.split(w["norm.weight"], groups), strict=True)
        ys.append(
            w["out_proj.weight"]
            @ np.concatenate([rms_norm(part, own, config.ssm_norm_eps or config.norm_eps) for part, own in parts])
        )
        errors.append(error)
    return np.array(ys), np.array(errors)


def gated_delta(config, w: dict[str, Array], u: Array) -> tuple[Array, Array]:
    size, heads, P = config.ssm_size, config.ssm_heads, config.ssm_head_dim
    groups, N = config.ssm_groups, config.ssm_state_size
    ends = np.cumsum([size + 2 * groups * N, size, heads])
    qkv, z, b, a = np.split(u @ w["in_proj.weight"].T, ends, axis=1)
    qkv = silu(causal_conv(qkv, w["conv.weight"]))
    S = np.zeros((heads, N, P))
    inner_eps = config.ssm_norm_eps or config.norm_eps
    ys, errors = [], []
    for t in range(len(u)):
        q = qkv[t, : groups * N].reshape(groups, N)
        k = qkv[t, groups * N : 2 * groups * N].reshape(groups, N)
        v = qkv[t, 2 * groups * N :].reshape(heads, P)
        out, error = np.zeros((heads, P)), 0.0
        for n in range(heads):
            g = n // (heads // groups)
            key = k[g] / math.sqrt(np.sum(k[g] ** 2) + 1e-6)
            query = q[g] / math.sqrt(np.sum(q[g] ** 2) + 1e-6) / math.sqrt(N)
            error += np.sum((v[n] - key @ S[n]) ** 2) / np.sum(v[n] ** 2) / heads
            beta = 1 / (1 + math.exp(-b[t, n]))
            S[n] *= math.exp(-math.exp(w["A_log"][n]) * softplus(a[t, n] + w["dt_bias"][n]))
            S[n] += np.outer(key, beta * (v[n] - key @ S[n]))
            out[n] = rms_norm(query @ S[n], w["norm.weight"], inner_eps) * silu(z[t].reshape(heads, P)[n])
        ys.append(w["out_proj.weight"] @ out.reshape(-1))
        errors.append(error)
    return np.array(ys), np.array(errors)


def s6(config, w: dict[str, Array], u: Array) -> tuple[Array, Array]:
    N, rank = config.ssm_state_size, config.ssm_dt_rank
    x, z = np.split(u @ w["in_proj.weight"].T, 2, axis=1)
    x = silu(causal_conv(x, w["conv.weight"], w["conv.bias"]))
    low, B, C = np.split(x @ w["x_proj.weight"].T, [rank, rank + N], axis=1)
    h = np.zeros((x.shape[1], N))
    ys, errors = [], []
    for t in range(len(u)):
        predicted = h @ B[t] / (B[t] @ B[t])
        errors.append(np.sum((x[t] - predicted) ** 2) / np.sum(x[t] ** 2))
        y = np.zeros(x.shape[1])
        for d in range(x.shape[1]):
            step = softplus(w["dt_proj.weight"][d] @ low[t] + w["dt_bias"][d])
            h[d] = np.exp(-step * np.exp(w["A_log"][d])) * h[d] + step * B[t] * x[t, d]
            y[d] = C[t] @ h[d] + w["D"][d] * x[t, d]
        ys.append(w["out_proj.weight"] @ (y * silu(z[t])))
    return np.array(ys), np.array(errors)


def rls(config, k: Array) -> Array:
    """Kalman leverage of unit vectors k [T, r], by inverting the precision for every token."""
    g, chunk, scores = config.innovation_forgetting, config.chunk_size, []
    for t in range(len(k)):
        start = t - t % chunk
        trace = sum(g ** (start - 1 - j) * k[j] @ k[j] for j in range(start))
        precision = (RIDGE + trace / 1e5) * np.eye(k.shape[1])
        for j in range(t):
            precision += (g ** (start - j) if j < start else 1.0) * np.outer(k[j], k[j])
        leverage = k[t] @ np.linalg.inv(precision) @ k[t]
        scores.append(leverage / (1 + leverage))
    return np.array(scores)


def ema(config, x: Array) -> Array:
    g, scores = config.innovation_forgetting, []
    for t in range(len(x)):
        mean = sum((g ** (t - 1 - j) * x[j] for j in range(t)), np.zeros(x.shape[1]))
        scores.append(1 - x[t] @ mean / (np.linalg.norm(x[t]) * np.linalg.norm(mean)) if t else 1.0)
    return np.array(scores)


def innovation(mixer: Mixer, w: dict[str, Array], x: Array, y: Array | None, state_error: Array | None) -> Array:
    config, time = mixer.config, np.arange(len(x))
    match config.innovation:
        case "rls":
            k = x if "innovation.projection" not in w else x @ w["innovation.projection"]
            return rls(config, k / np.linalg.norm(k, axis=1, keepdims=True))
        case "ema":
            return ema(config, x)
        case "state":
            assert state_error is not None
            return state_error
        case "head":
            assert y is not None
            past = np.vstack([np.zeros(x.shape[1]), y[:-1]])
            error = x - past @ w["innovation.predict.weight"].T
            return np.sum(error**2, 1) / np.sum(x**2, 1)
        case "recent":
            return np.ones(len(x))
        case "first":
            return 1 / (1 + time)
    return position_score("random", torch.as_tensor(time), mixer.innovation.index).double().numpy()  # type: ignore[union-attr]


def eidetic_set(config, scores: Array, end: int) -> list[int]:
    """The best positions among all p < end; ties to the newer."""
    past = [p for p in range(end) if scores[p] >= config.eidetic_threshold]
    past.sort(key=lambda p: (scores[p] * config.eidetic_decay ** (end - p), p), reverse=True)
    return past[: config.eidetic_slots]


def stored_block(config, start: int, k: Array, v: Array, scores: Array | None) -> Stored:
    turned = np.array([[rotary(head, j, config.rope_theta) for head in key] for j, key in enumerate(k)])
    if scores is None:
        parts = np.array_split(turned, min(config.storage_keys, len(k)))
        return Stored(start, k, v, np.array([part.mean(0) for part in parts]))
    best = sorted(range(len(k)), key=lambda j: (-scores[j], j))[: config.storage_keys]
    return Stored(start, k, v, turned[best])


def best_blocks(
    config, s: int, base: int, q: Array, own: list[Stored], others: list[Stored]
) -> list[tuple[bool, Stored]]:
    """What the stride from s on reads, and whether it is the source's own. q [T, heads, P], not turned; a found block
    stands from `base` on; others in the order in which they were stored."""
    group = config.num_heads // config.num_kv_heads

    def score(block: Stored) -> float:
        return max(
            sum(rotary(q[t, h], t - base, config.rope_theta) @ key[h // group] for h in range(config.num_heads))
            / math.sqrt(config.head_dim)
            for t in range(max(0, s - config.storage_queries + 1), s + 1)
            for key in block.keys
        )

    if s == 0:
        return []
    out_of_window = s + config.storage_stride - config.window
    past = [b for b in own if b.start + config.storage_block <= s and b.start < out_of_window]
    candidates = [(score(b), True, b.start, b) for b in past] + [(score(b), False, n, b) for n, b in enumerate(others)]
    candidates.sort(key=lambda candidate: candidate[:3], reverse=True)
    return [(mine, block) for _, mine, _, block in candidates[: config.storage_blocks]]


def literal_mixer(mixer: Mixer, x: Array, others: list[Stored] | None = None) -> Reading:
    """`others`: the blocks of other sources in the store; None: nothing is read from it, its own blocks neither."""
    config, kind = mixer.config, mixer.kind
    w = {name: tensor.double().numpy() for name, tensor in mixer.state_dict().items()}
    y = state_error = None
    if "ssm.in_proj.weight" in w:
        own = {name.removeprefix("ssm."): z for name, z in w.items() if name.startswith("ssm.")}
        y, state_error = {"ssd": ssd, "gdn": gated_delta, "s6": s6}[config.ssm](config, own, x)
    if kind == "ssm":
        assert y is not None
        return Reading(y)
    shifted = causal_conv(x, w["conv.weight"]) if config.conv_size else x

    T, P, C, W = len(x), config.head_dim, config.chunk_size, None if kind == "full" else config.window
    F = config.fading_span if kind == "bmojo" else 0
    E = config.eidetic_slots if kind == "bmojo" else 0
    theta, eps, heads, kv = config.rope_theta, config.norm_eps, config.num_heads, config.num_kv_heads

    def head_of(source: Array, what: str, head: int) -> Array:
        rows = slice(head * P, (head + 1) * P)
        z = w[f"{what}_proj.weight"][rows] @ source
        if config.qkv_bias:
            z = z + w[f"{what}_proj.bias"][rows]
        norm = w.get(f"{what}_norm.weight")
        return z if norm is None else rms_norm(z, norm, eps)

    scores = innovation(mixer, w, shifted, y, state_error) if E else None
    if E and config.admission == "learned":
        features = np.stack([x, shifted][: 1 + bool(config.conv_size)], 1)  # [T, 1 or 2, D]
        scores = scores * np.exp(np.einsum("tnd,nd->t", features, w["admission.weight"]) + w["admission.bias"])
    sets = [eidetic_set(config, scores, c * C) for c in range(T // C + 1)] if scores is not None else []
    stored: list[Stored] = []
    found: list[tuple[bool, Stored]] = []
    if mixer.index in config.storage_layers:
        kv_heads, n = range(kv), config.storage_block
        bare_q = np.array([[head_of(x[t], "q", h) for h in range(heads)] for t in range(T)])
        bare_k = np.array([[head_of(shifted[t], "k", h) for h in kv_heads] for t in range(T)])
        bare_v = np.array([[head_of(x[t], "v", h) for h in kv_heads] for t in range(T)])
        for start in range(0, T, n):
            part = slice(start, start + n)
            own_scores = None if scores is None else scores[part]
            stored.append(stored_block(config, start, bare_k[part], bare_v[part], own_scores))
    output = np.zeros((T, config.hidden_size))
    for i in range(T):
        extra = []  # what is read from storage: (key, value), by heads, and the position that turns the key
        if others is not None:
            base = i // C * C - W - F - E - config.storage_block
            if i % config.storage_stride == 0:
                found = best_blocks(config, i, base, bare_q, stored, others)
            for mine, block in found:
                for j in range(len(block.k)):
                    p = block.start + j
                    if mine and (p > i - W or (E and p in sets[i // C])):
                        continue
                    stands = p if mine and config.positions == "true" else base + j
                    extra.append((block.k[j], block.v[j], stands))
        # what the query sees: (source of the key, of the value, position that turns the key, prefix of the projections)
        first = 0 if W is None else max(0, i - W + 1)
        seen = [(shifted[j], x[j], j, "") for j in range(first, i + 1)]
        if W is not None:
            every = C if config.fading == "summary" else 1
            own = "" if config.tie_sources else "fading_"
            seen += [(y[j], y[j], j, own) for j in range(max(0, i - W - F + 1), i - W + 1) if (j + 1) % every == 0]
        if E:
            chosen = sorted(sets[i // C])
            for rank, p in enumerate(chosen):
                compact = i // C * C - W - F - E + rank
                if p <= i - W:
                    seen.append((shifted[p], x[p], p if config.positions == "true" else compact, ""))
        out = []
        for head in range(heads):
            query = {own: rotary(head_of(x[i], f"{own}q", head), i, theta) for own in {own for *_, own in seen}}
            shared = head // (heads // kv)
            keys = [(rotary(head_of(key, f"{own}k", shared), p, theta), query[own]) for key, _, p, own in seen]
            values = [head_of(value, f"{own}v", shared) for _, value, _, own in seen]
            plain = rotary(head_of(x[i], "q", head), i, theta)
            keys += [(rotary(key[shared], p, theta), plain) for key, _, p in extra]
            values = np.array(values + [value[shared] for _, value, _ in extra])
            logits = np.array([k @ q for k, q in keys]) / math.sqrt(P)
            weights = np.exp(logits - logits.max())
            out.append(weights @ values / weights.sum())
        output[i] = w["o_proj.weight"] @ np.concatenate(out)
    return Reading(output, scores, sets, stored)


def literal_model(
    model: BMojoLM, x: Array, others: dict[int, list[Stored]] | None = None
) -> tuple[Array, dict[int, list[Stored]]]:
    """Logits [T, vocab] of a model that reads the embeddings x [T, D], and what each of its storage layers hands over;
    `others`: of each storage layer, the blocks of other sources. None: nothing is read from storage."""
    config, handed = model.config, {}

    def normed(norm, x: Array) -> Array:
        return np.array([rms_norm(row, norm.weight.detach().numpy(), config.norm_eps) for row in x])

    for i, block in enumerate(model.blocks):
        theirs = others[i] if others is not None and i in config.storage_layers else None
        reading = literal_mixer(block.mixer, normed(block.mixer_norm, x), theirs)
        x = x + reading.output
        if i in config.storage_layers:
            handed[i] = reading.blocks
        if block.mlp is not None:
            w = {name: tensor.numpy() for name, tensor in block.mlp.state_dict().items()}
            gate, up = np.split(normed(block.mlp_norm, x) @ w["gate_up.weight"].T, 2, axis=1)
            x = x + (silu(gate) * up) @ w["down.weight"].T
    head = model.embed if model.head is None else model.head
    return normed(model.norm, x) @ head.weight.detach().numpy().T, handed
