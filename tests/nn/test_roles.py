"""Weight decay: the role of every parameter of a model, by name."""

from __future__ import annotations

import pytest
import torch
from cases import small_preset

from bmojo.nn.init import KeyConv, decays, parameter_groups
from bmojo.nn.model import BMojoLM

BLOCK = {"mixer_norm.weight": False, "mlp_norm.weight": False, "mlp.gate_up.weight": True, "mlp.down.weight": True}
SSM = {"A_log": False, "dt_bias": False, "conv.weight": False, "in_proj.weight": True, "norm.weight": False,
       "out_proj.weight": True}  # fmt: skip
ATTENTION = {f"mixer.{name}_proj.weight": True for name in "qkvo"}
ADMISSION = {"mixer.admission.weight": True, "mixer.admission.bias": False}
SSD = {f"mixer.ssm.{name}": role for name, role in {**SSM, "D": False, "conv.bias": False}.items()}
S6 = SSD | {f"mixer.ssm.{name}_proj.weight": True for name in ("x", "dt")}
del S6["mixer.ssm.norm.weight"]
ROLES = {
    "transformer": ATTENTION,
    "mamba": S6,
    "mamba2": SSD,
    "gdn": {f"mixer.ssm.{name}": role for name, role in SSM.items()},
    "bmojo": ATTENTION | SSD | ADMISSION | {"mixer.conv.weight": False},
    "bmojo, every option": ATTENTION
    | SSD
    | ADMISSION
    | {"mixer.conv.weight": False, "mixer.innovation.predict.weight": True}
    | {f"mixer.fading_{name}_proj.weight": True for name in "qkv"}
    | {f"mixer.{name}_norm.weight": False for name in ("q", "k", "fading_q", "fading_k")}
    | {f"mixer.{path}{name}_proj.bias": False for name in "qkv" for path in ("", "fading_")},
}


@pytest.mark.parametrize("model", ROLES)
def test_every_parameter_has_its_role(model):
    preset, _, every = model.partition(", ")
    options = {"tie_sources": False, "qk_norm": True, "qkv_bias": True, "innovation": "head", "tie_embeddings": False}
    changes = options if every else {}
    lm = BMojoLM(small_preset(preset, **changes))
    expected = {f"blocks.{i}.{name}": role for i in range(2) for name, role in (BLOCK | ROLES[model]).items()}
    expected |= {"embed.weight": True, "norm.weight": False} | ({"head.weight": True} if every else {})
    assert decays(lm) == expected


def test_groups_hold_each_trained_parameter_once():
    lm = BMojoLM(small_preset("bmojo"))
    lm.embed.weight.requires_grad_(False)
    with_decay, without = parameter_groups(lm, 0.1)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (with_decay, without) for p in group["params"]]
    assert len(ids) == len(set(ids)) == sum(1 for _ in lm.parameters()) - 1
    assert all(p.ndim > 1 for p in with_decay["params"])


def test_the_convolution_of_keys_starts_near_the_token_before():
    torch.manual_seed(0)
    for size in (1, 2, 4):
        conv = KeyConv(64, size)
        x = torch.randn(1, 50 + conv.lags, 64)
        y = conv(x).detach()
        near = x[:, conv.lags - 1 : -1] if size > 1 else None
        assert y.shape == (1, 50, 64)
        if near is not None:
            assert torch.cosine_similarity(y.flatten(), near.flatten(), dim=0) > 0.9
