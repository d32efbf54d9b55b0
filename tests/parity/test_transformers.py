"""The corners of the family are the models of Transformers: same weights, same logits, loss, gradients and decoding.

See `twins` for how Transformers is kept from rounding to float32.
"""

from __future__ import annotations

import pytest
from cases import VOCAB, draw_tokens
from transformers import (
    BambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from twins import convert_and_compare

ATTENTION = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "pad_token_id": None,
}
MAMBA2 = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 4,
    "state_size": 6,
    "expand": 2,
    "chunk_size": 8,
    "pad_token_id": None,
}
BAMBA = ATTENTION | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1, 3],
    "mamba_n_heads": 8,
    "mamba_d_head": 4,
    "mamba_d_state": 6,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_is_transformer(kv_heads, tied):
    ours = convert_and_compare(LlamaConfig(**ATTENTION, num_key_value_heads=kv_heads, tie_word_embeddings=tied))
    assert ours.config.kinds == ("attention", "attention")
    assert ours.config.window is None


def test_llama_with_heads_of_their_own_size():
    ours = convert_and_compare(LlamaConfig(**ATTENTION, head_dim=6))
    assert ours.config.head_dim == 6


@pytest.mark.parametrize("window", [2, 5, 6, 8, 64])
def test_mistral_is_swa(window):
    config = MistralConfig(**ATTENTION, num_key_value_heads=2, sliding_window=window)
    ours = convert_and_compare(config, draw_tokens(2, 43))
    assert ours.config.window == window


def test_mistral_without_a_window_is_transformer():
    assert (
        convert_and_compare(MistralConfig(**ATTENTION, num_key_value_heads=2, sliding_window=None)).config.window
        is None
    )


@pytest.mark.parametrize("window", [None, 6])
def test_qwen2_has_biases(window):
    window_of = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    ours = convert_and_compare(Qwen2Config(**ATTENTION, num_key_value_heads=2, **window_of))
    assert ours.config.qkv_bias
    assert ours.config.window == window


@pytest.mark.parametrize("first", [1, 2])
def test_qwen2_with_first_layers_over_the_whole_past(first):
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": first}
    ours = convert_and_compare(Qwen2Config(**ATTENTION | {"num_hidden_layers": 3}, num_key_value_heads=2, **window))
    assert ours.config.kinds == ("full",) * first + ("attention",) * (3 - first)
    assert ours.config.window == 6


def test_qwen3_with_layers_of_both_kinds_by_turns():
    kinds = {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    ours = convert_and_compare(Qwen3Config(**ATTENTION | {"num_hidden_layers": 4}, num_key_value_heads=2, **kinds))
    assert ours.config.pattern == ("attention", "full")
    assert ours.config.window == 5


def test_qwen3_normalises_queries_and_keys():
    ours = convert_and_compare(Qwen3Config(**ATTENTION, num_key_value_heads=2, head_dim=6))
    assert ours.config.qk_norm


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "conv_kernel": 3}, {"time_step_rank": 5, "expand": 1, "state_size": 1}],
)
def test_mamba_is_mamba(changes):
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 6, "pad_token_id": None}
    ours = convert_and_compare(MambaConfig(**sizes | changes))
    assert ours.config.kinds == ("ssm", "ssm")
    assert ours.config.ssm_dt_rank == changes.get("time_step_rank", 2)
    assert ours.config.intermediate_size == 0


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_mamba2_is_mamba2(groups):
    ours = convert_and_compare(Mamba2Config(**MAMBA2, n_groups=groups))
    assert ours.config.kinds == ("ssm", "ssm")
    assert ours.config.intermediate_size == 0


def test_mamba2_with_tied_embeddings_and_other_sizes():
    convert_and_compare(
        Mamba2Config(**MAMBA2 | {"conv_kernel": 3, "head_dim": 8, "num_heads": 4}, n_groups=1, tie_word_embeddings=True)
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_bamba_is_hybrid(groups):
    ours = convert_and_compare(BambaConfig(**BAMBA, mamba_n_groups=groups))
    assert ours.config.kinds == ("ssm", "attention") * 2
    assert ours.config.pattern == ("ssm", "attention")
