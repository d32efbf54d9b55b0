"""What our corners become in other formats: Transformers loads it and computes the same; and it comes back the same."""

from __future__ import annotations

import json

import pytest
import torch
from cases import close, draw_tokens, make_model
from transformers import AutoModelForCausalLM

from bmojo import BMojoLM
from bmojo.config import ModelConfig
from bmojo.convert import FORMATS, ConversionError, convert, export_model, import_model

STACK = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2}
SSM = {"ssm_head_dim": 8, "ssm_state_size": 6, "ssm_expand": 2}
FULL = STACK | {"pattern": ("attention",), "window": None}
CORNERS = [
    ("llama", FULL),
    ("mistral", FULL | {"window": 6, "chunk_size": 6, "tie_embeddings": False}),
    ("qwen2", FULL | {"qkv_bias": True, "window": 8, "chunk_size": 4}),
    ("qwen2", FULL | {"qkv_bias": True, "window": 6, "chunk_size": 6, "pattern": ("full", "attention")}),
    ("qwen3", FULL | {"qk_norm": True, "head_dim": 6, "rope_theta": 50.0}),
    (
        "qwen3",
        FULL
        | {"qk_norm": True, "window": 6, "chunk_size": 6, "pattern": ("attention", "full", "full"), "num_layers": 3},
    ),
    (
        "mamba",
        {
            "ssm": "s6",
            "ssm_state_size": 6,
            "ssm_expand": 2,
            "ssm_dt_rank": 3,
            "vocab_size": 13,
            "hidden_size": 16,
            "pattern": ("ssm",),
            "intermediate_size": 0,
            "window": None,
        },
    ),
    (
        "mamba2",
        SSM | {"vocab_size": 13, "hidden_size": 16, "pattern": ("ssm",), "intermediate_size": 0, "window": None},
    ),
    ("bamba", FULL | SSM | {"pattern": ("ssm", "attention"), "num_layers": 4}),
]


@pytest.mark.parametrize(("name", "settings"), CORNERS)
def test_transformers_loads_what_is_exported(tmp_path, name, settings):
    model = make_model(ModelConfig(**settings), dtype=torch.float32)
    model.save(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "theirs", to=name)
    assert (done.source_format, done.target_format, done.dtype) == ("bmojo", name, "float32")
    assert done.parameters == sum(parameter.numel() for parameter in model.parameters())
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.model_type == name
    tokens = draw_tokens(2, 30)
    with torch.no_grad():
        close(theirs(tokens, use_cache=False).logits, model(tokens)[0], 1e-4)
    convert(tmp_path / "theirs", tmp_path / "back")
    back = BMojoLM.load(tmp_path / "back")
    assert back.config.replace(chunk_size=model.config.chunk_size).to_dict() | {"num_heads": 4, "num_kv_heads": 4,
        "head_dim": 4} == model.config.to_dict() | {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4}  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(("name", "settings"), CORNERS)
def test_settings_survive_both_ways(name, settings):
    config = ModelConfig(**settings)
    settings = FORMATS[name].write(config)
    again = FORMATS[name].read(json.loads(json.dumps(settings)))
    assert FORMATS[name].write(again) | {"chunk_size": 0, "mamba_chunk_size": 0} == settings | {
        "chunk_size": 0,
        "mamba_chunk_size": 0,
    }
    assert again.kinds == config.kinds


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"window": 64}, "window=64 (it would be None)"),
        ("llama", {"qk_norm": True}, "qk_norm=True"),
        ("llama", {"qkv_bias": True}, "qkv_bias=True"),
        ("llama", {"conv_size": 4}, "conv_size=4"),
        ("llama", {"intermediate_size": 0}, "intermediate_size=0"),
        ("llama", {"pattern": ("full", "attention"), "window": 64}, "layers of the kinds attention, full; window=64"),
        ("qwen2", {}, "qkv_bias=False (it would be True)"),
        ("mamba2", {}, "layers of the kinds attention"),
        ("mamba", {"pattern": ("ssm",), "intermediate_size": 0}, "ssm='ssd'"),
        ("mamba2", {"pattern": ("ssm",), "ssm": "s6", "intermediate_size": 0}, "ssm='s6'"),
        ("llama", {"pattern": ("ssm",), "ssm": "gdn"}, "layers of the kinds ssm"),
        ("bamba", {"pattern": ("ssm",), "ssm": "gdn"}, "ssm='gdn'"),
        ("bamba", {"pattern": ("ssm",), "ssm_norm_eps": 0.001}, "ssm_norm_eps=0.001 (it would be 1e-05)"),
        ("mamba2", {"pattern": ("ssm",)}, "intermediate_size=24"),
        ("llama", {"pattern": ("bmojo",), "window": 64, "eidetic_slots": 4}, "layers of the kinds bmojo"),
        (
            "hybrid_llama",
            {"pattern": ("bmojo",), "window": 64, "fading_span": 64, "eidetic_slots": 4},
            "eidetic_slots=4",
        ),
        ("hybrid_llama", {"pattern": ("bmojo",), "window": 64, "fading_span": 128}, "fading_span=128"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(name, settings, message):
    config = ModelConfig(**FULL | {"ssm_head_dim": 8} | settings)
    with pytest.raises(ConversionError, match=f"^{name} can't hold ") as caught:
        export_model(name, config, make_model(config).state_dict())
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "bamba", "hybrid_llama"])
def test_the_whole_past_is_the_same_by_either_name(name):
    """Attention without a window, and "full" attention beside a window that no layer has."""
    mixed = {} if name == "llama" else {"ssm_groups": 4, "ssm_head_dim": 4, "ssm_state_size": 4}
    kinds = ("ssm",) if mixed else ()
    plain, named = (
        ModelConfig(**FULL | mixed | {"pattern": (*kinds, "attention"), "window": None}),
        ModelConfig(**FULL | mixed | {"pattern": (*kinds, "full"), "window": 64}),
    )
    settings = FORMATS[name].write(named)
    assert FORMATS[name].read(settings) == FORMATS[name].read(FORMATS[name].write(plain)) == plain


def test_the_epsilon_inside_the_state_space_layers():
    """1e-5 in the authors' Mamba-2, whatever the others are; a setting of theirs in the gated delta net."""
    hybrid = FORMATS["hybrid_llama"]
    inner = {"pattern": ("ssm", "attention"), "ssm_groups": 4, "ssm_head_dim": 4, "ssm_state_size": 4, "norm_eps": 1e-6}
    ssd = ModelConfig(**FULL | inner | {"ssm_norm_eps": 1e-5})
    assert hybrid.read(hybrid.write(ssd)) == ssd
    for eps in (None, 1e-3):
        gdn = ModelConfig(**FULL | inner | {"ssm": "gdn", "ssm_norm_eps": eps})
        assert hybrid.read(hybrid.write(gdn)) == gdn
    with pytest.raises(ConversionError, match=r"ssm_norm_eps=1e-06 \(it would be 1e-05\)"):
        hybrid.write(ssd.replace(ssm_norm_eps=None))


def test_heads_that_share_rows_in_the_format_must_agree():
    config = ModelConfig(
        **FULL | {"pattern": ("ssm", "attention"), "ssm_groups": 4, "ssm_head_dim": 4, "ssm_state_size": 4}
    )
    with pytest.raises(
        ConversionError, match=r"shares rows of blocks\.0\.mixer\.ssm\.\S+ between heads; here they differ"
    ):
        export_model("hybrid_llama", config, make_model(config).state_dict())


def test_the_embedding_may_be_stored_twice_but_not_two_ways():
    config = ModelConfig(**FULL)
    settings, tensors = export_model("llama", config, make_model(config).state_dict())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # old checkpoints hold these
    assert import_model(settings, tensors)[0].tie_embeddings
    tensors["lm_head.weight"][0] += 1
    with pytest.raises(ConversionError, match=r"lm_head\.weight is not the embedding"):
        import_model(settings, tensors)
