"""Model folders: written and read through Transformers and through BMojoLM."""

import json
import subprocess
import sys

import pytest
import torch
from cases import draw_tokens, make_model, small_preset
from hf_cases import PRESETS, hf_model, same_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bmojo import BMojoByteTokenizer, BMojoConfig, BMojoForCausalLM, BMojoLM, presets
from bmojo.errors import CheckpointError, ConfigError
from bmojo.hf.registration import register


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_bit_for_bit(name, tied, tmp_path):
    model = hf_model(name, torch.float32, tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is BMojoForCausalLM
    assert again.config.core == model.config.core
    same_weights(again, model)
    tokens = draw_tokens(2, 21)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_shards(tied, tmp_path):
    model = hf_model("bmojo", torch.float32, tie_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    same_weights(BMojoLM.load(tmp_path), model.model)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_folders_of_BMojoLM_and_back(name, tied, tmp_path):
    core = make_model(small_preset(name, tie_embeddings=tied), dtype=torch.float32)
    core.save(tmp_path / "core")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "core", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_weights(model.model, core)
    model.save_pretrained(tmp_path / "hf")
    again = BMojoLM.load(tmp_path / "hf")
    same_weights(again, core)
    assert again.config == core.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mamba2", "gdn", "bmojo"])
def test_decay_rates_stay_float32_in_half_precision(name, dtype, tmp_path):
    hf_model(name, torch.float32).save_pretrained(tmp_path / "full")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=dtype)
    for key, parameter in half.named_parameters():
        exact = key.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if exact else dtype), key
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    same_weights(again, half)
    same_weights(BMojoLM.load(tmp_path / "half"), half.model)
    with torch.no_grad():
        assert again(draw_tokens(2, 9)).logits.isfinite().all()


def drop(folder, *endings):
    """Rewrite a checkpoint without the tensors whose names end so; their names."""
    tensors = load_file(folder / "model.safetensors")
    lost = {name for name in tensors if name.endswith(endings)}
    assert lost
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return lost


WIDE = {"hidden_size": 256, "num_heads": 2, "ssm_head_dim": 2, "intermediate_size": 256, "innovation_dim": 16}


def drawn_alike(tensor, new, name):
    """Another draw of the same distribution as the parameter of a new model; or the same constant."""
    assert tensor.isfinite().all(), name
    if name.endswith("projection") or (new.std(0, correction=0) == 0).all():
        assert torch.equal(tensor, new), name
        return
    assert not torch.equal(tensor, new), name
    assert abs(tensor.std() - new.std()) < 6 * new.std() / new.numel() ** 0.5, name
    assert (tensor.mean(0) - new.mean(0)).abs().max() < 8 * new.std() / new.shape[0] ** 0.5, name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("mamba2", ("ssm.D",)),
        ("mamba2", ("ssm.A_log",)),
        ("mamba", ("ssm.A_log", "dt_bias", "dt_proj.weight")),
        ("gdn", ("dt_bias", "in_proj.weight")),
        ("bmojo", ("innovation.projection",)),
        ("bmojo", ("mixer.conv.weight", "ssm.conv.bias")),
        ("bmojo", ("embed.weight", "o_proj.weight", "mlp.down.weight", "mixer_norm.weight")),
        ("transformer", ("head.weight", "q_proj.bias", "q_norm.weight")),
    ],
)
def test_what_a_checkpoint_lacks_is_drawn_as_in_a_new_model(name, endings, tmp_path):
    extra = {"tie_embeddings": False, "qkv_bias": True, "qk_norm": True} if name == "transformer" else {}
    model = hf_model(name, torch.float32, **WIDE, **extra)
    model.save_pretrained(tmp_path)
    lost = drop(tmp_path, *endings)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lost
    new = BMojoLM(model.config.core)
    for key, tensor in loaded.state_dict().items():
        if key in lost:
            drawn_alike(tensor, new.state_dict()[key.removeprefix("model.")], key)
        else:
            assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["hybrid", "mamba", "gdn", "bmojo"])
def test_new_models_have_the_statistics_of_BMojoLM(name):
    config = small_preset(name, **WIDE)
    core = BMojoLM(config).state_dict()
    with torch.device("meta"):
        empty = BMojoForCausalLM(BMojoConfig.from_core(config))
    empty.to_empty(device="cpu").init_weights()
    for model in (BMojoForCausalLM(BMojoConfig.from_core(config)), empty):
        for key, tensor in model.model.state_dict().items():
            drawn_alike(tensor, core[key], key)


def test_configurations_and_models_by_the_auto_classes(tmp_path):
    config = BMojoConfig.from_core(small_preset("hybrid"))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).core == config.core
    assert AutoConfig.for_model("bmojo", **config.core.to_dict()).core == config.core
    assert type(AutoModelForCausalLM.from_config(config)) is BMojoForCausalLM


FRESH = """
{imports}
import torch
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model).__name__ == "BMojoForCausalLM", type(model)
assert type(AutoConfig.from_pretrained({folder!r})).__name__ == "BMojoConfig"
tokenizer = AutoTokenizer.from_pretrained({folder!r})
assert type(tokenizer).__name__ == "BMojoByteTokenizer", type(tokenizer)
print(model.generate(**tokenizer("hi", return_tensors="pt"), max_new_tokens=5, do_sample=False).tolist())
"""
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer"


@pytest.mark.slow
@pytest.mark.parametrize("imports", [f"import bmojo\n{AUTO}", f"{AUTO}\nimport bmojo", "import bmojo.hf\n" + AUTO])
def test_in_a_new_process_in_any_order_of_imports(imports, tmp_path):
    model = hf_model("bmojo", torch.float32, vocab_size=256)
    model.save_pretrained(tmp_path)
    tokenizer = BMojoByteTokenizer()
    tokenizer.save_pretrained(tmp_path)
    code = FRESH.format(imports=imports, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model.generate(**tokenizer("hi", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_import_of_bmojo_alone_imports_neither_torch_nor_transformers():
    code = "import bmojo, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.slow
def test_registration_changes_nothing_else_that_is_imported():
    code = (
        "import bmojo, inspect, transformers\n"
        "from bmojo.hf.registration import register\n"
        "register(); register()\n"
        "from transformers.models.auto import configuration_auto, tokenization_auto\n"
        "assert 'class AutoConfig' in inspect.getsource(configuration_auto)\n"
        "assert configuration_auto.__spec__.loader is not None and tokenization_auto.__file__\n"
        "assert transformers.AutoConfig.for_model('llama').model_type == 'llama'\n"
        "assert transformers.AutoConfig.for_model('bmojo').model_type == 'bmojo'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rewrite(folder, **changes):
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def test_refused_folders(tmp_path):
    hf_model("swa", torch.float32).save_pretrained(tmp_path)
    rewrite(tmp_path, format_version=2)
    with pytest.raises(ConfigError, match=r"format_version is 2, this bmojo reads up to 1; update bmojo"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"format_version is 2"):
        BMojoLM.load(tmp_path)
    rewrite(tmp_path, format_version=1, windw=8)
    with pytest.raises(ConfigError, match=r"unknown setting 'windw'; did you mean 'window'\?"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean 'window'"):
        BMojoLM.load(tmp_path)


def test_folders_of_another_kind_of_model_are_refused(tmp_path):
    tiny = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**tiny, intermediate_size=16)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model_type must be 'bmojo', got 'llama'; use `bmojo convert`"):
        BMojoForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"got 'llama'; use `bmojo convert`"):
        BMojoLM.load(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_settings_changed_on_loading_are_checked(tmp_path):
    hf_model("swa", torch.float32).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, window=16).model.config.window == 16
    with pytest.raises(ConfigError, match=r"window must be a positive multiple of chunk \(4\), got 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path, window=5)


def test_the_tokenizer_of_a_folder_without_one(tmp_path):
    BMojoLM(presets.swa("tiny")).save(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is BMojoByteTokenizer


def test_placed_on_a_device_on_loading(tmp_path):
    model = hf_model("bmojo", torch.float32)
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(placed(draw_tokens(2, 9)).logits, model(draw_tokens(2, 9)).logits)


def test_registered_again_in_a_process_that_has_both():
    before = list(sys.meta_path)
    register()
    assert sys.meta_path == before
    assert type(AutoConfig.for_model("bmojo")) is BMojoConfig
