"""A B'MOJO layer out of a linear system: x(t+1) = A x(t) + B u(t), y(t) = C x(t) + D u(t) from x = 0.

A token of the layer is [u, 1, 0 ...], and a sequence begins with one of u = 0 (`layer_input`); its first p outputs are
y. Two constructions, both of the layer as it is, with weights alone:

**Fading state** (kind "ssm", Mamba-1). A real mode x' = r x + b'u with 0 < r < 1 is a pair of channels that take
+-b'u, because silu(v) - silu(-v) = v exactly: their scans differ by that of v. Steps are softplus(dt_bias) = -log r at
rate 1; B and C are read off one channel whose convolution has nothing but a bias, the gate off the input's 1, so both
are constants, divided out in the output. The convolution reads one token back, for y(t) has x(t), not x(t+1); D u is
modes of pole 0 that read the token itself. Exact.

**Window and faded state** (kind "bmojo", or "attention" without the latter). Any other pole has no home in decays that
are real and positive, but

    y(t) = sum_{j < W} h_j u(t-j)  +  C A^(W-1) x(t-W+1),      h_0 = D,  h_j = C A^(j-1) B

is the layer's own definition: the window verbatim, and before it what faded. Query and key are constants turned by
their positions, so the score of lag l in head j is a cos(theta (l - j)), theta W <= pi / 2 and a (1 - cos theta) = 40:
head j reads lag j (another with weight e^-40 at most), or, before there is one, the first token, whose u is 0. Its
output map is h_j. Of x(t-W+1), modes of poles in (0, 1) are scanned as above and read by one more head, at lag W, as
the newest fading token; the rest, R = (A_r, B_r, C_r), is left out, and the layer is within

    sup |error| <= sup |u| sum_{j >= W} |C_r A_r^(j-1) B_r|

of the system. The sum is what `tolerance` refuses.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import RealizationError
from bmojo.nn.mixer import Mixer
from bmojo.nn.ssm import S6
from bmojo.realize.lti import LTI, Array, whole

SHARP = 40.0  # how far the score of a head's own lag is above that of any other
NEVER = 800.0  # a rate that leaves nothing: exp(-800) = 0 in every dtype
LONGEST = 256  # window that is chosen here: a head for each lag
HORIZON = 100_000  # lags that are summed


class Modes(NamedTuple):
    """k real modes: x' = pole x + inputs . token, contributing x outputs. `back`: how many tokens back they read."""

    poles: Array  # [k], in [0, 1)
    inputs: Array  # [k, hidden]
    outputs: Array  # [k, hidden]
    back: Array  # [k], 0 or 1

    @classmethod
    def of(cls, poles: Array, inputs: Array, outputs: Array, *, back: int, hidden: int, into: int = 0) -> Modes:
        """From inputs [k, m] and outputs [k, q], which are written to the channels `into` and on."""
        k = len(poles)
        ins, outs = np.zeros((k, hidden)), np.zeros((k, hidden))
        ins[:, : inputs.shape[1]] = inputs
        outs[:, into : into + outputs.shape[1]] = outputs
        return cls(poles, ins, outs, np.full(k, back))

    def join(self, other: Modes) -> Modes:
        return Modes(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


def to_layer(
    system: LTI, *, window: int | None = None, tolerance: float = 1e-9, hidden_size: int | None = None
) -> Mixer:
    """The layer, in float64, of the least size unless `hidden_size` is given.

    Kind "ssm" where all poles are real, in (0, 1) and well apart, and no `window` is asked for. Else a window of that
    length, or of the least one, up to 256, of which the bound above is `tolerance` at most.
    Refused: an unstable system, and a window that leaves more than `tolerance` (with the number, and the one that would
    do). It trains from there; but scores this sharp have no gradient, so what learns is the decays and steps, and
    the maps in and out.
    """
    if system.radius >= 1:
        raise RealizationError(
            f"the system is unstable: its largest pole has modulus {system.radius:.10g}, and a layer only forgets"
        )
    poles, inputs, outputs, rest = _split(system)
    if rest is None and window is None:
        return _faded(system, poles, inputs, outputs, hidden_size)
    return _windowed(system, poles, inputs, outputs, _window(rest, window, tolerance), hidden_size)


def _faded(system: LTI, poles: Array, inputs: Array, outputs: Array, hidden_size: int | None) -> Mixer:
    """Of kind "ssm"."""
    _, m, p = system.sizes
    hidden = _hidden(max(m + 1, p), hidden_size)
    modes = Modes.of(poles, inputs, outputs, back=1, hidden=hidden)
    through = (np.eye(m), system.D.T) if m <= p else (system.D, np.eye(p))
    modes = modes.join(Modes.of(np.zeros(min(m, p)), *through, back=0, hidden=hidden))
    layer = _mixer(hidden, len(modes.poles), pattern=("ssm",))
    _scan(layer, modes, one=m)
    return layer


def _windowed(system: LTI, poles: Array, inputs: Array, outputs: Array, window: int, hidden_size: int | None) -> Mixer:
    """Of kind "bmojo", or "attention" if there are no modes to fade."""
    _, m, p = system.sizes
    kept = len(poles) > 0
    hidden = _hidden(max(m + 1 + kept * p, p), hidden_size)
    size = max(4, m + kept * p)
    size += size % 2
    angle = math.pi / (2 * window)
    attention = {
        "num_heads": window + kept, "num_kv_heads": 1, "head_dim": size, "window": window, "chunk_size": window,
        "rope_theta": angle ** (-size / (size - 2)), "fading_span": kept * window,
    }  # fmt: skip
    layer = _mixer(hidden, len(poles) + 1, pattern=("bmojo",) if kept else ("attention",), **attention)
    _read_lags(layer, system.impulse(window - 1), angle, kept)
    if kept:  # fading tokens are [0, 1, C A^(window-1) x]: they have a 1 too, to make their keys from
        states = Modes.of(poles, inputs, poles[:, None] ** (window - 1) * outputs, back=0, hidden=hidden, into=m + 1)
        one = Modes.of(np.zeros(1), np.eye(1, m + 1, m), np.ones((1, 1)), back=0, hidden=hidden, into=m)
        _scan(layer, states.join(one), one=m)
    return layer


def layer_input(layer: Mixer, u: Tensor) -> Tensor:
    """What a layer of `to_layer` reads for u [B, T, m]: [B, 1 + T, hidden_size], the first token without input. Of its
    outputs [:, 1:, :p] are y."""
    first = u.new_zeros(u.shape[0], 1, u.shape[2])
    tokens = F.pad(torch.cat((first, u), 1), (0, 1), value=1.0)
    return F.pad(tokens, (0, layer.config.hidden_size - tokens.shape[-1]))


def left_out(rest: LTI | None, longest: int) -> Array:
    """sum_{j >= W} |C A^(j-1) B| of what only a window can hold, for W = 0 ... longest (2-norms; D is j = 0)."""
    if rest is None:
        return np.zeros(longest + 1)
    enough = len(rest.A) + (np.log(1e-20) / np.log(rest.radius) if rest.radius > 0 else 0)
    h = rest.impulse(int(min(max(enough, longest), HORIZON)))
    return np.cumsum(np.linalg.norm(h, 2, (1, 2))[::-1])[::-1][: longest + 1]


def _split(system: LTI) -> tuple[Array, Array, Array, LTI | None]:
    """The modes with poles in (0, 1): the poles [k], what drives them [k, m], what they give [k, p]; and the rest."""
    none = np.zeros(0), np.zeros((0, system.sizes[1])), np.zeros((0, system.sizes[2]))
    try:
        modal = system.to_modal()
    except RealizationError:  # poles that coincide: the window takes them as they are
        return *none, system
    alone = ~(modal.A - np.diag(np.diag(modal.A))).any(0)
    real = alone & (np.diag(modal.A) > 0)
    kept = np.diag(modal.A)[real], modal.B[real], modal.C[:, real].T
    if real.all():
        return *kept, None
    return *kept, LTI(modal.A[np.ix_(~real, ~real)], modal.B[~real], modal.C[:, ~real], modal.D)


def _window(rest: LTI | None, window: int | None, tolerance: float) -> int:
    """The window asked for, or the least one that will do; refused if it leaves out more than `tolerance`."""
    if window is not None:
        whole("window", window, 1)
    left = left_out(rest, max(window or 0, 100 * LONGEST))
    enough = np.flatnonzero(left <= tolerance)
    least = max(1, int(enough[0])) if len(enough) else None
    if window is None and least is not None and least <= LONGEST:
        return least
    asked = LONGEST if window is None else window
    if not left[asked] <= tolerance:
        raise RealizationError(
            f"a window of {asked} leaves out {left[asked]:.3g} of the response (the sum of |C A^(j-1) B| over the lags "
            f"j beyond it, of modes whose poles are not in (0, 1)), above tolerance {tolerance:g}; "
            + (f"window={least} would do" if least else f"no window up to {len(left) - 1} would do")
            + ", or allow a larger tolerance"
        )
    return asked


def _hidden(least: int, asked: int | None) -> int:
    return least if asked is None else whole("hidden_size, for inputs, a 1, and outputs,", asked, least)


def _mixer(hidden: int, modes: int, **settings: Any) -> Mixer:
    """A layer with room for the modes: two channels each, and one that is constant."""
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_layers": 1,
        "intermediate_size": 0,
        "num_heads": 1,
        "head_dim": 2,
    }
    ssm = {"ssm": "s6", "ssm_state_size": 1, "ssm_conv": 2, "ssm_expand": -(-(2 * modes + 1) // hidden)}
    return Mixer(ModelConfig(**(sizes | ssm | settings))).double()


@torch.no_grad()
def _scan(layer: Mixer, modes: Modes, one: int) -> None:
    """Makes the scan that of the modes, given that channel `one` of each token is 1. Channels to spare keep what they
    were drawn with and are not read out, until training does."""
    ssm = layer.ssm
    assert isinstance(ssm, S6)
    assert ssm.conv.bias is not None
    (rank, _, _), size, constant = ssm.parts, ssm.size, 2 * len(modes.poles)
    poles, inputs, outputs = (torch.from_numpy(z).repeat_interleave(2, 0) for z in modes[:3])
    used, sign = slice(constant), torch.tensor([1.0, -1.0], dtype=poles.dtype).repeat(len(modes.poles))
    dt = torch.where(poles > 0, -poles.log(), 1.0)
    ssm.dt_proj.weight.zero_()
    ssm.dt_bias[used] = dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
    ssm.A_log[used] = torch.where(poles > 0, 0.0, math.log(NEVER))[:, None]
    ssm.D[used] = 0
    ssm.in_proj.weight[used] = sign[:, None] * inputs
    ssm.in_proj.weight[size : size + constant] = 0
    ssm.in_proj.weight[size : size + constant, one] = 1
    ssm.in_proj.weight[constant] = 0
    ssm.conv.weight[: constant + 1] = 0
    back = torch.from_numpy(modes.back).repeat_interleave(2)
    ssm.conv.weight[torch.arange(constant), 1 - back] = 1
    ssm.conv.bias[: constant + 1] = 0
    ssm.conv.bias[constant] = 1
    silu = F.silu(torch.ones((), dtype=poles.dtype))  # of the constant channel, and of the gates
    ssm.x_proj.weight.zero_()
    ssm.x_proj.weight[rank:, constant] = 1 / silu
    ssm.out_proj.weight.zero_()
    ssm.out_proj.weight[:, used] = (sign[:, None] * outputs / (dt[:, None] * silu)).T


@torch.no_grad()
def _read_lags(layer: Mixer, h: Array, angle: float, fading: bool) -> None:
    """Head j reads lag j and gives h_j [p, m] of what it finds; the last one reads the newest fading token."""
    window, p, m = h.shape
    size, half = layer.config.head_dim, layer.config.head_dim // 2
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        projection.weight.zero_()
    turn = angle * torch.arange(layer.config.num_heads, dtype=torch.float64)
    scale = SHARP / (1 - math.cos(angle)) * size**0.5
    q = layer.q_proj.weight.unflatten(0, (-1, size))[..., m]  # [heads, head_dim], of the 1
    q[:, half - 1], q[:, -1] = scale * turn.cos(), -scale * turn.sin()  # the slowest pair that positions turn
    layer.k_proj.weight[half - 1, m] = 1
    layer.v_proj.weight[:m, :m] = torch.eye(m)
    o = layer.o_proj.weight.unflatten(1, (-1, size))[:p]  # [p, heads, head_dim]
    o[:, :window, :m] = torch.from_numpy(h).transpose(0, 1)
    if fading:
        layer.v_proj.weight[m : m + p, m + 1 : m + 1 + p] = torch.eye(p)
        o[:, window, m : m + p] = torch.eye(p)
