"""The fading memory: input-dependent state-space models, x [B, L, D] -> fading tokens y [B, L, D].

Each SSM works on a laid-out sequence (`forward`) or on one token (`step`), with its state in a dict of tensors:
`ssm` [B, heads, state_size, head_dim] (s6: [B, state_size, channels]), float32; `ssm_conv` [B, ssm_conv - 1, channels],
the inputs of the convolution. A tracked state (`MemoryState.tracked`) also has `transition`, what is left of an older
`ssm` after the tokens read: its log for ssd [B, heads, 1, 1] and s6 [B, state_size, channels], for gdn the matrix
[B, heads, state_size, state_size].
`predict=True` also returns, detached, what the state before each token predicted of it: (value, prediction), both
[B, L, heads, head_dim], where all channels of s6, which share B and C, are one head.
Shape suffixes: B batch, L slots, H heads, G groups, N state size, P head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo.config import ModelConfig
from bmojo.errors import StateError
from bmojo.memory.layout import Layout
from bmojo.memory.step import Step
from bmojo.nn.init import CausalConv, Linear, Output, RMSNorm
from bmojo.ops.gated_delta import gated_delta, gated_delta_decode
from bmojo.ops.numerics import at_least_float32, repeat_groups
from bmojo.ops.s6 import s6, s6_decode
from bmojo.ops.ssd import ssd, ssd_decode

State = dict[str, Tensor]
Prediction = tuple[Tensor, Tensor] | None


class FadingMemory(nn.Module):
    """What the SSMs share: the convolution with its tail, and the decay parameters.

    `A_log`, of shape `decays`, is the log of decay rates drawn from [1, 16]; `dt_bias`, as long as its first dimension,
    the inverse softplus of steps log-uniform in [1e-3, 1e-1] (Gu and Dao 2023).
    """

    no_decay: tuple[str, ...] = ("A_log", "dt_bias")

    def __init__(
        self, config: ModelConfig, channels: int, *, conv_bias: bool, decays: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = config.ssm_heads, config.ssm_head_dim
        self.groups, self.state_size = config.ssm_groups, config.ssm_state_size
        self.size, self.chunk_size = config.ssm_size, config.chunk_size
        self.norm_eps = config.norm_eps if config.ssm_norm_eps is None else config.ssm_norm_eps
        self.conv = CausalConv(channels, config.ssm_conv, bias=conv_bias)
        decays = (self.heads,) if decays is None else decays
        self.dt_bias = nn.Parameter(torch.empty(decays[0]))
        self.A_log = nn.Parameter(torch.empty(decays))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
        dt += torch.log(-torch.expm1(-dt))
        self.A_log.uniform_(1, 16).log_()

    def _convolve(self, x: Tensor, state: State | None, layout: Layout) -> tuple[Tensor, Tensor]:
        extended = layout.extend(x, None if state is None else state["ssm_conv"], self.conv.lags)
        mixed = self.conv(extended, layout.position if layout.packed else None, silu=True)
        return mixed, layout.tail(extended, self.conv.lags)

    def _transition(self, state: State | None, at: Layout | Step, *inputs: Tensor) -> State:
        """The transition after `inputs` [B, L, ...], if the state that came in keeps one."""
        if state is None or "transition" not in state:
            return {}
        if isinstance(at, Layout) and at.packed:
            raise StateError(
                "a tracked state is that of one document, got document_ids; "
                "read each document from a state of its own, or from one that is not tracked"
            )
        return {"transition": self._transit(state["transition"], *inputs)}

    def _transit(self, transition: Tensor, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def _convolve_step(self, x: Tensor, state: State, at: Step) -> tuple[Tensor, Tensor]:
        return self.conv.step(x, at.own(state["ssm_conv"]), silu=True)


class SSD(FadingMemory):
    """Mamba-2: [z, x, B, C, dt] = W_in u; x, B, C through a short convolution and SiLU; the scan of `ops.ssd`;
    y = W_out RMSNorm((scan + D x) * SiLU(z)), the norm group by group.  Source: Dao and Gu 2024, arXiv 2405.21060."""

    no_decay = ("A_log", "dt_bias", "D")

    def __init__(self, config: ModelConfig) -> None:
        self.bc = config.ssm_groups * config.ssm_state_size
        super().__init__(config, config.ssm_size + 2 * self.bc, conv_bias=True)
        std = config.initializer_range
        self.in_proj = Linear(config.hidden_size, 2 * self.size + 2 * self.bc + self.heads, std)
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(self.size, self.norm_eps, config.ssm_groups)
        self.out_proj = Output(self.size, config.hidden_size, std)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.D.fill_(1)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = self.in_proj(u).split((self.size, self.size + 2 * self.bc, self.heads), -1)
        return z, xBC, F.softplus(at_least_float32(dt) + self.dt_bias)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = xBC.split((self.size, self.bc, self.bc), -1)
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.state_size)),
            C.unflatten(-1, (self.groups, self.state_size)),
        )

    def _transit(self, transition: Tensor, *inputs: Tensor) -> Tensor:
        (dt,) = inputs
        return transition - (dt.sum(1) * at_least_float32(self.A_log).exp())[..., None, None]

    def _output(self, scanned: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = (scanned + self.D[:, None] * x).flatten(-2).to(z.dtype)
        return self.out_proj(self.norm(y * F.silu(z)))

    def forward(
        self, u: Tensor, state: State | None, layout: Layout, *, predict: bool = False
    ) -> tuple[Tensor, State, Prediction]:
        z, xBC, dt = self._project(u)
        xBC, tail = self._convolve(xBC, state, layout)
        x, B, C = self._split(xBC)
        dt = dt * layout.valid[..., None].to(dt.dtype)
        h = None if state is None else state["ssm"]
        options = {"chunk_size": self.chunk_size, "state": h, "resets": layout.resets}
        scanned, final = ssd(x, dt, self.A_log, B, C, **options)
        prediction = None
        if predict:
            with torch.no_grad():
                prediction = x, ssd(x, dt, self.A_log, B, _dual(B), exclusive=True, **options)[0]
        new = {"ssm": final, "ssm_conv": tail} | self._transition(state, layout, dt)
        return self._output(scanned, x, z), new, prediction

    def step(self, u: Tensor, state: State, at: Step, *, predict: bool = False) -> tuple[Tensor, State, Prediction]:
        z, xBC, dt = self._project(u)
        xBC, tail = self._convolve_step(xBC, state, at)
        x, B, C = self._split(xBC)
        prediction = None
        if predict:
            unit = repeat_groups(_dual(B), self.heads)
            prediction = x.detach(), (at_least_float32(unit)[..., None, :] @ state["ssm"]).squeeze(-2).detach()
        scanned, h = ssd_decode(x, dt, self.A_log, B, C, state=at.own(state["ssm"]))
        new = {"ssm": h, "ssm_conv": tail} | self._transition(state, at, dt[:, None])
        return self._output(scanned, x, z), new, prediction


class GatedDeltaNet(FadingMemory):
    """Gated delta net: [q, k, v, z, b, a] = W_in u; q, k, v through a short convolution and SiLU, q and k to unit norm;
    beta = sigmoid(b), g = -exp(A_log) softplus(a + dt_bias); the rule of `ops.gated_delta`;
    y = W_out (RMSNorm(o) * SiLU(z)), head by head.  Source: arXiv 2412.06464, as in Qwen3-Next."""

    def __init__(self, config: ModelConfig) -> None:
        self.qk = config.ssm_groups * config.ssm_state_size
        super().__init__(config, config.ssm_size + 2 * self.qk, conv_bias=False)
        std = config.initializer_range
        self.in_proj = Linear(config.hidden_size, 2 * self.size + 2 * self.qk + 2 * self.heads, std)
        self.norm = RMSNorm(self.head_dim, self.norm_eps)
        self.out_proj = Output(self.size, config.hidden_size, std)
        self.reset_parameters()

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        qkv, z, b, a = self.in_proj(u).split((self.size + 2 * self.qk, self.size, self.heads, self.heads), -1)
        g = -at_least_float32(self.A_log).exp() * F.softplus(at_least_float32(a) + self.dt_bias)
        return qkv, z, at_least_float32(b).sigmoid(), g

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split((self.qk, self.qk, self.size), -1)
        q, k = (repeat_groups(self._unit(part), self.heads) for part in (q, k))
        return q * self.state_size**-0.5, k, v.unflatten(-1, (self.heads, self.head_dim))

    def _unit(self, x: Tensor) -> Tensor:
        """[..., groups * state_size] -> [..., groups, state_size], of unit norm."""
        x = at_least_float32(x).unflatten(-1, (self.groups, self.state_size))
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def _transit(self, transition: Tensor, *inputs: Tensor) -> Tensor:
        """What the rule makes of the columns of `transition` where all values are zero."""
        k, beta, g = inputs
        chunk = self.chunk_size if k.shape[1] > 1 else 1
        none = torch.zeros_like(k)
        return gated_delta(none, k, none, beta, g, chunk_size=chunk, state=transition)[1]

    def _output(self, o: Tensor, z: Tensor) -> Tensor:
        gated = self.norm(o.to(z.dtype)) * F.silu(z.unflatten(-1, (self.heads, self.head_dim)))
        return self.out_proj(gated.flatten(-2))

    def forward(
        self, u: Tensor, state: State | None, layout: Layout, *, predict: bool = False
    ) -> tuple[Tensor, State, Prediction]:
        qkv, z, beta, g = self._project(u)
        qkv, tail = self._convolve(qkv, state, layout)
        q, k, v = self._split(qkv)
        alive = layout.valid[..., None].to(beta.dtype)
        beta, g = beta * alive, g * alive
        options = {
            "chunk_size": self.chunk_size,
            "state": None if state is None else state["ssm"],
            "resets": layout.resets,
        }
        o, final = gated_delta(q, k, v, beta, g, **options)
        prediction = None
        if predict:
            with torch.no_grad():
                prediction = v, gated_delta(k, k, v, beta, g, exclusive=True, **options)[0]
        new = {"ssm": final, "ssm_conv": tail} | self._transition(state, layout, k, beta, g)
        return self._output(o, z), new, prediction

    def step(self, u: Tensor, state: State, at: Step, *, predict: bool = False) -> tuple[Tensor, State, Prediction]:
        qkv, z, beta, g = self._project(u)
        qkv, tail = self._convolve_step(qkv, state, at)
        q, k, v = self._split(qkv)
        prediction = None
        if predict:
            prediction = v.detach(), (k[..., None, :] @ state["ssm"]).squeeze(-2).detach()
        o, S = gated_delta_decode(q, k, v, beta, g, state=at.own(state["ssm"]))
        new = {"ssm": S, "ssm_conv": tail} | self._transition(state, at, k[:, None], beta[:, None], g[:, None])
        return self._output(o, z), new, prediction


class S6(FadingMemory):
    """Mamba-1: [x, z] = W_in u; x through a short convolution and SiLU; [r, B, C] = W_x x, r of `ssm_dt_rank` numbers;
    dt = softplus(W_dt r + dt_bias); the scan of `ops.s6`; y = W_out ((scan + D x) * SiLU(z)).

    The rates exp(A_log) of a channel start at 1 ... state_size.  Source: Gu and Dao 2023, arXiv 2312.00752."""

    no_decay = ("A_log", "dt_bias", "D")

    def __init__(self, config: ModelConfig) -> None:
        size, state_size, rank = config.ssm_size, config.ssm_state_size, config.ssm_dt_rank
        super().__init__(config, size, conv_bias=True, decays=(size, state_size))
        self.parts = (rank, state_size, state_size)
        std = config.initializer_range
        self.in_proj = Linear(config.hidden_size, 2 * size, std)
        self.x_proj = Linear(size, sum(self.parts), std)
        self.dt_proj = Linear(rank, size, (3 * rank) ** -0.5)  # as wide as Mamba's uniform draw from +-rank^-1/2
        self.D = nn.Parameter(torch.empty(size))
        self.out_proj = Output(size, config.hidden_size, std)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.A_log.copy_(torch.arange(1, self.state_size + 1).log())
        self.D.fill_(1)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, B, C = self.x_proj(x).split(self.parts, -1)
        return F.softplus(at_least_float32(self.dt_proj(low)) + self.dt_bias), B, C

    def _transit(self, transition: Tensor, *inputs: Tensor) -> Tensor:
        (dt,) = inputs
        return transition - dt.sum(1)[:, None] * at_least_float32(self.A_log).exp().T

    def _output(self, scanned: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return self.out_proj((scanned + self.D * x).to(z.dtype) * F.silu(z))

    def forward(
        self, u: Tensor, state: State | None, layout: Layout, *, predict: bool = False
    ) -> tuple[Tensor, State, Prediction]:
        x, z = self.in_proj(u).chunk(2, -1)
        x, tail = self._convolve(x, state, layout)
        dt, B, C = self._select(x)
        dt = dt * layout.valid[..., None].to(dt.dtype)
        h = None if state is None else state["ssm"]
        options = {"chunk_size": self.chunk_size, "state": h, "resets": layout.resets}
        scanned, final = s6(x, dt, self.A_log, B, C, **options)
        prediction = None
        if predict:
            with torch.no_grad():
                read = s6(x, dt, self.A_log, B, _dual(B), exclusive=True, **options)[0]
                prediction = x[..., None, :], read[..., None, :]
        new = {"ssm": final, "ssm_conv": tail} | self._transition(state, layout, dt)
        return self._output(scanned, x, z), new, prediction

    def step(self, u: Tensor, state: State, at: Step, *, predict: bool = False) -> tuple[Tensor, State, Prediction]:
        x, z = self.in_proj(u).chunk(2, -1)
        x, tail = self._convolve_step(x, state, at)
        dt, B, C = self._select(x)
        prediction = None
        if predict:
            prediction = x[:, None].detach(), (at_least_float32(_dual(B))[:, None] @ state["ssm"]).detach()
        scanned, h = s6_decode(x, dt, self.A_log, B, C, state=at.own(state["ssm"]))
        new = {"ssm": h, "ssm_conv": tail} | self._transition(state, at, dt[:, None])
        return self._output(scanned, x, z), new, prediction


def _dual(B: Tensor) -> Tensor:
    """B / |B|^2: read with it, a state that holds B x^T alone gives x."""
    return B / B.square().sum(-1, keepdim=True).clamp(min=torch.finfo(B.dtype).tiny)


SSMS: dict[str, type[SSD | GatedDeltaNet | S6]] = {"ssd": SSD, "gdn": GatedDeltaNet, "s6": S6}


def make_ssm(config: ModelConfig) -> SSD | GatedDeltaNet | S6:
    return SSMS[config.ssm](config)
