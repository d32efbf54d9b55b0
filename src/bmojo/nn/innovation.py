"""The innovation test of a layer: which score, and the state that it keeps between calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo.config import ModelConfig
from bmojo.memory.layout import Layout
from bmojo.memory.spec import innovation_dim
from bmojo.memory.step import Step
from bmojo.nn.init import Linear
from bmojo.nn.ssm import Prediction, State
from bmojo.ops import innovation as ops
from bmojo.ops.numerics import at_least_float32


class Innovation(nn.Module):
    """Scores s_t >= 0 of the layer's input x_t given everything before t; detached.

    `rls`, `ema`: see `ops.innovation`. `state`: |v_t - S_{t-1}^T k_t|^2 / |v_t|^2, mean over heads, read off the SSM's
    own state. `head`: |x_t - P y_{t-1}|^2 / |x_t|^2 with a linear P, trained by an auxiliary loss on detached features.
    `random`, `recent`, `first` look at positions alone: baselines.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.kind, self.index, self.chunk_size = config.innovation, index, config.chunk_size
        self.forgetting = config.innovation_forgetting
        if self.kind == "rls":
            self.dim = innovation_dim(config)
            whole = self.dim == config.hidden_size
            self.register_buffer("projection", None if whole else torch.empty(config.hidden_size, self.dim))
            self.projection: Tensor | None
            self.reset_parameters()
        elif self.kind == "head":
            self.predict = Linear(config.hidden_size, config.hidden_size, config.initializer_range)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the projection of `rls`: fixed, the same in every model of this shape."""
        if self.kind == "rls" and self.projection is not None:
            drawn = torch.randn(
                self.projection.shape, generator=torch.Generator().manual_seed(self.index), device="cpu"
            )
            self.projection.copy_(drawn * drawn.shape[0] ** -0.5)

    def _features(self, x: Tensor) -> Tensor:
        """Unit-norm inputs of `rls`, projected."""
        if self.projection is not None:
            x = x @ self.projection.to(x.dtype)
        return F.normalize(at_least_float32(x), dim=-1)

    def forward(
        self, x: Tensor, y: Tensor | None, prediction: Prediction, state: State | None, layout: Layout
    ) -> tuple[Tensor, State, Tensor | None]:
        """x, y [B, L, D] -> scores [B, L], the new state, and the auxiliary loss of "head" of each row [B]."""
        x = x.detach()
        options: dict[str, Any] = {"chunk_size": self.chunk_size, "resets": layout.resets}
        match self.kind:
            case "rls":
                with torch.no_grad():
                    k = self._features(x)
                    start = (
                        ops.rls_start(x.shape[0], self.dim, k) if state is None else (state["rls_A"], state["rls_M"])
                    )
                    score, A, M = ops.rls(k, layout.valid, *start, forgetting=self.forgetting, **options)
                return score, {"rls_A": A, "rls_M": M}, None
            case "ema":
                with torch.no_grad():
                    mean = None if state is None else state["ema"]
                    score, mean = ops.ema(x, layout.valid, mean, forgetting=self.forgetting, **options)
                return score, {"ema": mean}, None
            case "state":
                with torch.no_grad():
                    score = ops.relative_error(*prediction).mean(-1)  # type: ignore[misc]
                return score, {}, None
            case "head":
                last = None if state is None else state["last_y"][:, None]
                extended = layout.extend(y.detach(), last, 1)  # type: ignore[union-attr]
                past = extended[:, :-1] * (layout.position > 0)[..., None].to(x.dtype)
                error = ops.relative_error(x, self.predict(past))
                loss = (error * layout.valid).sum(1) / layout.valid.sum(1).clamp(min=1)
                return error.detach(), {"last_y": layout.tail(extended, 1)[:, 0]}, loss
        return ops.position_score(self.kind, layout.position, self.index).to(at_least_float32(x).dtype), {}, None

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor | None, prediction: Prediction, state: State, at: Step) -> tuple[Tensor, State]:
        """x, y [B, D] -> scores [B] and the new state."""
        match self.kind:
            case "rls":
                k = self._features(x)
                A, M = at.own(state["rls_A"]), at.own(state["rls_M"])
                score, A, M = ops.rls_decode(k, A, M, at.ends_chunk, forgetting=self.forgetting)
                return score, {"rls_A": A, "rls_M": M}
            case "ema":
                score, mean = ops.ema_step(x, state["ema"], forgetting=self.forgetting)
                return score, {"ema": mean}
            case "state":
                return ops.relative_error(*prediction).mean(-1), {}  # type: ignore[misc]
            case "head":
                return ops.relative_error(x, self.predict(state["last_y"])), {"last_y": y}  # type: ignore[dict-item]
        return ops.position_score(self.kind, at.position, self.index).to(at_least_float32(x).dtype), {}
