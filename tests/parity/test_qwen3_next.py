"""The gated delta layers of Qwen3-Next are `gdn`: a whole model of nothing else, with dense MLPs.

No such checkpoint exists, so that the mapping stands here and not among the converters.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import VOCAB, draw_tokens
from transformers import Qwen3NextConfig
from twins import agree, compare, make_theirs, one_by_one, run_ours, run_theirs

from bmojo.config import ModelConfig
from bmojo.convert.blocks import ATTENTION, LLAMA, same
from bmojo.convert.mapping import Format, Rule, check_tensors, header_of, import_tensors
from bmojo.nn.model import BMojoLM


def mixer(config: ModelConfig) -> Iterator[Rule]:
    """Their projections hold, one head of keys after another: q, k, then v and z of its value heads; and b, then a."""
    groups, shared = config.ssm_groups, config.ssm_heads // config.ssm_groups
    wide = shared * config.ssm_head_dim
    sizes = (config.ssm_state_size, config.ssm_state_size, wide, wide)
    qkvz = torch.arange(groups * sum(sizes)).view(groups, -1).split(sizes, 1)
    ba = torch.arange(groups * 2 * shared).view(groups, -1).split(shared, 1)
    yield Rule(
        "ssm.in_proj.weight",
        (
            ("linear_attn.in_proj_qkvz.weight", (groups * sum(sizes), config.hidden_size)),
            ("linear_attn.in_proj_ba.weight", (2 * config.ssm_heads, config.hidden_size)),
        ),
        torch.cat([*(rows.flatten() for rows in qkvz), *(rows.flatten() + groups * sum(sizes) for rows in ba)]),
    )
    channels = config.ssm_size + 2 * groups * config.ssm_state_size
    yield Rule("ssm.conv.weight", (("linear_attn.conv1d.weight", (channels, 1, config.ssm_conv)),))
    for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
        yield same(f"ssm.{name}", f"linear_attn.{name}")


FORMAT = Format(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    names=LLAMA,
    fields=ATTENTION,
    read_layers=lambda reading, ours: {},
    write_layers=lambda config: {},
    mixers={"ssm": mixer},
)
PLUS_ONE = ("layernorm.weight", "model.norm.weight")  # their norms, but for the one in the mixer, multiply by 1 + w


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 4), (4, 4), (1, 4)])
def test_qwen3_next_is_gdn(key_heads, value_heads):
    theirs = make_theirs(
        Qwen3NextConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            rms_norm_eps=1e-6,
            linear_key_head_dim=6,
            linear_value_head_dim=4,
            linear_num_key_heads=key_heads,
            linear_num_value_heads=value_heads,
            layer_types=["linear_attention"] * 2,
            mlp_only_layers=[0, 1],
            pad_token_id=None,
        )
    )
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        tie_embeddings=False,
        norm_eps=1e-6,
        pattern=("ssm",),
        window=None,
        ssm="gdn",
        ssm_head_dim=4,
        ssm_state_size=6,
        ssm_groups=key_heads,
    )
    weights = {name: z + 1 if name.endswith(PLUS_ONE) else z for name, z in theirs.state_dict().items()}
    check_tensors(FORMAT, config, header_of(weights))
    ours = BMojoLM(config).double()
    ours.load_state_dict(import_tensors(FORMAT, config, weights))
    tokens = draw_tokens(2, 70)
    expected = run_theirs(theirs, tokens)
    mapped = import_tensors(FORMAT, config, expected.gradients)
    agree(one_by_one(ours, tokens), expected.logits, "logits, one token at a time")
    compare(run_ours(ours, tokens), expected._replace(gradients=mapped))
