"""What can't be held is refused by name, from config.json alone where that tells it, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmojo.config import ModelConfig
from bmojo.convert import FORMATS, ConversionError, convert

LLAMA = FORMATS["llama"]
SIZES = {"vocab_size": 260, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
QWEN = SIZES | {"head_dim": 4, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
MAMBA2 = {"vocab_size": 260, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 4, "n_groups": 1}
BAMBA = SIZES | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": "auto", "partial_rotary_factor": 1.0}
HYBRID = SIZES | {
    "rms_norm_eps": 1e-5,
    "hybrid_override_pattern": "SWA-BMF",
    "swa_config": {"window_size": 64},
    "bmojo_config": {"window_size": 64},
}
MAMBA = {"vocab_size": 260, "hidden_size": 8, "num_hidden_layers": 2, "time_step_rank": "auto"}
VALID = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "bamba": BAMBA,
    "hybrid_llama": HYBRID,
    "hybrid_qwen3": HYBRID | {"head_dim": 4, "bmojo_config": {"window_size": 64, "ssm_mixer": "gdn"}},
}


def refusal(name, settings, window=None):
    with pytest.raises(ConversionError) as caught:
        FORMATS[name].read(settings, window)
    return str(caught.value)


@pytest.mark.parametrize("name", VALID)
def test_the_settings_below_are_refused_for_what_is_changed_alone(name):
    FORMATS[name].read(VALID[name])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "wide"}, "hidden_size='wide' (expected a number)"),
        ("llama", {"num_attention_heads": 2.5}, "num_attention_heads=2.5 (expected a whole number of at least 1)"),
        ("llama", {"num_attention_heads": 3}, "hidden_size must be a multiple of num_heads (3)"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True; only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling of the type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope scaling of the type 'llama3'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "rope_parameters by layer"),
        ("llama", {"rope_parameters": 3}, "rope_parameters=3 (expected an object)"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config (quantised weights)"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8 (experts)"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 (soft-capping of logits)"),
        ("llama", {"logits_scaling": 8}, "logits_scaling=8 (scaling of activations)"),
        ("mistral", {"sliding_window": 4093}, "no chunk of 16 to 256 tokens divides the window 4093; force one"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "expected a kind for each of 2 layers"),
        ("qwen3", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, "use_sliding_window is"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("mamba", {"use_bias": True}, "use_bias=True"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias=False"),
        ("mamba", {"time_step_rank": 0}, "time_step_rank=0 (expected a whole number of at least 1)"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, "time_step_limit=[0.0, 0.1] (steps are clamped)"),
        ("mamba2", {"use_conv_bias": False}, "use_conv_bias=False"),
        ("mamba2", {"use_bias": True}, "use_bias=True"),
        ("mamba2", {"num_heads": 3}, "num_heads * head_dim = 12 (expected expand * hidden_size = 16)"),
        ("bamba", {"partial_rotary_factor": None}, "partial_rotary_factor=0.5"),
        ("bamba", {"attn_layer_indices": 1}, "attn_layer_indices=1 (expected a list)"),
        ("bamba", {"mamba_d_head": 3}, "mamba_n_heads * mamba_d_head = 12 (expected"),
        ("bamba", {"time_step_limit": [0.001, None]}, "steps are clamped"),
        ("hybrid_llama", {"hybrid_override_pattern": None}, "hybrid_override_pattern is missing"),
        ("hybrid_llama", {"hybrid_override_pattern": "BMF"}, "names 1 layers of num_hidden_layers=2"),
        ("hybrid_llama", {"hybrid_override_pattern": "SWA-GKA"}, "has 'GKA' (Gated KalmaNet)"),
        ("hybrid_llama", {"hybrid_override_pattern": "*DA-BMF*"}, "has 'BMF*' (a layer of the distillation stage)"),
        ("hybrid_llama", {"hybrid_override_pattern": "SWA-XYZ"}, "has 'XYZ' (an unknown layer)"),
        ("hybrid_llama", {"swa_config": {"window_size": 32}}, "(SWA: 32, BMF: 64), ours have one; force"),
        ("hybrid_llama", {"swa_config": None}, "window_size is missing"),
        ("hybrid_llama", {"bmojo_config": {"window_size": 64, "ssm_mixer": "gka"}}, "'gka' (Gated Kal"),
        ("hybrid_llama", {"bmojo_config": {"window_size": 64, "ssm_mixer": "s4"}}, "an unknown mixer"),
        ("hybrid_llama", {"hybrid_override_pattern": "GDN-BMF"}, "both Mamba-2 and gated delta mixers"),
        ("hybrid_llama", {"head_dim": 8}, "their softmax takes hidden_size / num_attention_heads"),
        ("hybrid_llama", {"mamba2_config": {"use_pos_emb": True}}, "use_pos_emb"),
        ("hybrid_llama", {"rope_scaling": {"type": "yarn"}}, "rope scaling of the type 'yarn'"),
        ("hybrid_qwen3", {"bmojo_config": {"window_size": 64}}, "use_qk_norm"),
        ("hybrid_qwen3", {"gdn_config": {"allow_neg_eigval": True}}, "gdn_config: allow_neg_eigval=True; only False"),
        ("hybrid_qwen3", {"head_dim": 6}, "num_attention_heads * head_dim = 12 is no multiple of hidden_size=8"),
    ],
)  # fmt: skip
def test_by_name_from_the_configuration_alone(name, change, message):
    assert message in refusal(name, VALID[name] | change)


QWEN3_8B = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 5e6}  # fmt: skip
QWEN3_32B = QWEN3_8B | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                        "num_attention_heads": 64}  # fmt: skip


def recipe(base, other):
    """As the authors publish them, which docs/convert.md lists: every other layer `*`."""
    return base | {"hybrid_override_pattern": "-".join(["*", other] * (base["num_hidden_layers"] // 2))}


@pytest.mark.parametrize(
    ("other", "settings", "kinds", "eps"),
    [
        ("GDN", {}, ("attention", "ssm"), 1e-5),
        ("SWA", {"swa_config": {"window_size": 512}}, ("full", "attention"), None),
        ("BMF", {"bmojo_config": {"ssm_mixer": "gdn", "tie_attn_weights": False}}, ("full", "bmojo"), 1e-5),
        ("BMF", {"mamba2_config": {"use_qk_norm": False}}, ("full", "bmojo"), 1e-5),
    ],
)
def test_recipes_of_the_authors_that_convert(other, settings, kinds, eps):
    config = FORMATS["hybrid_qwen3"].read(recipe(QWEN3_8B, other) | settings)
    assert (config.pattern, config.norm_eps, config.ssm_norm_eps) == (kinds, 1e-6, eps)


@pytest.mark.parametrize(
    ("base", "other", "settings", "message"),
    [
        (QWEN3_8B, "M2", {"mamba2_config": {"use_qk_norm": True}}, "use_qk_norm"),
        (QWEN3_8B, "BMF", {"bmojo_config": {"ssm_mixer": "gka"}}, "Gated KalmaNet"),
        (QWEN3_8B, "GKA", {}, "Gated KalmaNet"),
        (QWEN3_8B, "BMF*", {}, "a layer of the distillation stage"),
        (QWEN3_32B, "GDN", {}, "num_attention_heads * head_dim = 8192 is no multiple of hidden_size=5120"),
    ],
)
def test_recipes_of_the_authors_that_do_not(base, other, settings, message):
    assert message in refusal("hybrid_qwen3", recipe(base, other) | settings)


def test_every_reason_is_named():
    message = refusal("llama", SIZES | {"hidden_act": "relu", "mlp_bias": True, "num_experts": 4})
    assert message.startswith("this llama can't be held by bmojo: ")
    assert all(name in message for name in ("hidden_act", "mlp_bias", "num_experts"))


@pytest.mark.parametrize("name", VALID)
def test_a_broken_configuration_is_an_error_for_the_user(name):
    """Whatever stands in the place of a value, it is read or refused; nothing else is raised."""
    keys = {*VALID[name], *FORMATS[name].fixed, "rope_theta", "rope_parameters", "layer_types", "num_heads", "expand"}
    for key in keys:
        for value in ("x", [], [1], {}, {"window_size": "x"}, {"rope_theta": "x"}, -1, 0, 2.5, True, None, 97):
            with contextlib.suppress(ConversionError):
                FORMATS[name].read(VALID[name] | {key: value})


def test_a_window_is_forced_where_there_is_attention():
    assert LLAMA.read(SIZES, 64).window == 64
    mixed = FORMATS["qwen2"].read(QWEN | {"max_window_layers": 1, "sliding_window": 4093}, 32)
    assert (mixed.window, mixed.pattern) == (32, ("attention",))
    mixed = FORMATS["hybrid_llama"].read(HYBRID | {"hybrid_override_pattern": "*-BMF"}, 64)
    assert (mixed.window, mixed.kinds) == (64, ("attention", "bmojo"))
    widened = FORMATS["hybrid_llama"].read(HYBRID | {"swa_config": {"window_size": 32}}, 64)
    assert (widened.window, widened.kinds) == (64, ("attention", "bmojo"))
    assert "no layer attends" in refusal("mamba2", MAMBA2, 64)
    assert "window=32 can't be forced: bmojo layers keep theirs, which is 64" in refusal("hybrid_llama", HYBRID, 32)
    assert "window must be a whole number of at least 1" in refusal("llama", SIZES, 0)


@pytest.mark.parametrize(
    ("window", "chunk"),
    [(None, 64), (4096, 256), (2048, 256), (256, 64), (64, 64), (100, 50), (17, 17), (1, 1), (2047, 89), (3, 3)],
)
def test_a_window_is_cut_into_chunks(window, chunk):
    config = LLAMA.read(SIZES, window) if window else LLAMA.read(SIZES)
    assert (config.window, config.chunk_size) == (window, chunk)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' can't be held by bmojo; known: bamba, "),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "; it has num_local_experts=8 (experts); did you mean 'mistral'",
        ),
        ({"model_type": None}, "model_type 'None'"),
    ],
)
def test_a_family_that_is_not_ours(rewrite, tmp_path, settings, message):
    with pytest.raises(ConversionError) as caught:
        convert(rewrite(**settings), tmp_path / "target")
    assert message in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_the_weights_are_not_read_for_what_the_configuration_tells(rewrite, tmp_path):
    folder = rewrite(hidden_act="gelu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="hidden_act='gelu'"):
        convert(folder, tmp_path / "target")


def damage(tensors):
    layer = "model.layers.0."
    yield (
        "self_attn.q_proj.weight is missing",
        {k: z for k, z in tensors.items() if k != f"{layer}self_attn.q_proj.weight"},
    )
    yield "self_attn.q_proj.bias is unknown in a llama", tensors | {f"{layer}self_attn.q_proj.bias": torch.zeros(8)}
    yield "has the shape (9, 8), expected (8, 8)", tensors | {f"{layer}self_attn.q_proj.weight": torch.zeros(9, 8)}
    yield "is I8: quantised", tensors | {f"{layer}self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.int8)}
    yield "F8_E4M3: quantised", tensors | {f"{layer}self_attn.q_proj.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)}
    yield "; and ", {}


def test_tensors_that_do_not_belong_there(llama, tmp_path):
    path = llama / "model.safetensors"
    for message, tensors in damage(load_file(path)):
        save_file(tensors, path)
        with pytest.raises(ConversionError) as caught:
            convert(llama, tmp_path / "target")
        assert message in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_the_target_must_be_new(llama, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    with pytest.raises(ConversionError, match="exists and is not an empty folder"):
        convert(llama, target)
    with pytest.raises(ConversionError, match="exists and is not an empty folder"):
        convert(llama, target / "mine.txt")
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_bmojo_model_needs_a_format_to_become(llama, tmp_path):
    convert(llama, tmp_path / "ours")
    with pytest.raises(ConversionError, match="is a bmojo model already; name a format"):
        convert(tmp_path / "ours", tmp_path / "other")
    with pytest.raises(ConversionError, match="unknown format 'lama'; did you mean 'llama'"):
        convert(tmp_path / "ours", tmp_path / "other", to="lama")
    convert(tmp_path / "ours", tmp_path / "short", window=32)
    assert json.loads((tmp_path / "short" / "config.json").read_text())["window"] == 32
    with pytest.raises(ConversionError, match="llama can't hold window=32"):
        convert(tmp_path / "short", tmp_path / "other", to="llama")
    assert not (tmp_path / "other").exists()


def test_a_window_is_not_forced_on_layers_with_other_memories(tmp_path):
    from bmojo import BMojoLM

    config = ModelConfig(hidden_size=8, num_heads=2, ssm_head_dim=4, fading_span=64)
    BMojoLM(config).save(tmp_path / "ours")
    with pytest.raises(ConversionError, match="bmojo layers keep theirs, which is 64"):
        convert(tmp_path / "ours", tmp_path / "other", window=32)
