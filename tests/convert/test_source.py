"""Where checkpoints are read from, what is taken along, and that a target appears whole or not at all."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cases import close, draw_tokens, shaken
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BambaConfig, LlamaConfig, Mamba2Config, MambaConfig

import bmojo
from bmojo.convert import ConversionError, convert, job
from bmojo.errors import MissingPackageError


def test_what_transformers_saves_in_shards_is_read(tmp_path):
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    theirs = shaken(AutoModelForCausalLM.from_config(config), dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    assert done.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert done.nbytes == sum(path.stat().st_size for path in (tmp_path / "ours").iterdir())
    tokens = draw_tokens(2, 20)
    with torch.no_grad():
        expected = theirs(tokens).logits
        close(bmojo.BMojoLM.load(tmp_path / "ours")(tokens)[0], expected, 1e-4)
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(tokens).logits, expected, 1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept_unless_another_is_asked_for(llama, tmp_path, stored):
    path = llama / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    assert convert(llama, tmp_path / "kept").dtype == str(stored).removeprefix("torch.")
    assert {z.dtype for z in load_file(tmp_path / "kept" / "model.safetensors").values()} == {stored}
    assert convert(llama, tmp_path / "cast", dtype=torch.float32).dtype == "float32"
    assert {z.dtype for z in load_file(tmp_path / "cast" / "model.safetensors").values()} == {torch.float32}


def test_the_tokenizer_goes_along(llama, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (llama / name).write_text(json.dumps({"eos_token_id": [5, 7], "of": name}))
    (llama / "training_args.bin").write_text("not this")
    convert(llama, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text())["eos_token_id"] == [5, 7]
    convert(tmp_path / "ours", tmp_path / "theirs", to="llama")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["eos_token_id"] == [5, 7]


def test_where_text_ends_is_kept_from_config_json_too(rewrite, tmp_path):
    convert(rewrite(bos_token_id=1, eos_token_id=2, pad_token_id=None), tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2}


def test_sources_that_are_none(tmp_path, llama):
    def refused(source, message):
        with pytest.raises(ConversionError) as caught:
            convert(source, tmp_path / "target")
        assert message in str(caught.value)
        assert not (tmp_path / "target").exists()

    refused(tmp_path / "missing", "there is no ")
    refused(llama / "config.json", "is a file; expected a model's folder")
    refused(tmp_path / "model.gguf", "there is no ")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no model's folder: config.json is missing")
    (llama / "generation_config.json").write_text("{")
    refused(llama, "generation_config.json can't be read")
    (llama / "generation_config.json").unlink()
    (llama / "model.safetensors").write_bytes(b"\xff" * 50)
    refused(llama, "can't be read as safetensors")
    (llama / "model.safetensors").unlink()
    refused(llama, "model.safetensors is missing")
    (llama / "pytorch_model.bin").write_bytes(b"")
    refused(llama, "its weights are pickled")
    index = llama / "model.safetensors.index.json"
    index.write_text("[]")
    refused(llama, "index.json can't be read")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused(llama, "model-1.safetensors is missing")
    (llama / "config.json").write_text("[]")
    refused(llama, "must hold a JSON object, got list")
    (llama / "config.json").write_text("{")
    refused(llama, "config.json can't be read")


def test_a_target_that_fails_half_way_leaves_nothing(llama, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.shutil, "copyfile", fail)
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match="No space left on device; nothing was left there"):
        convert(llama, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_an_empty_target_is_filled_and_its_parents_made(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    assert convert(llama, tmp_path / "empty").target == tmp_path / "empty"
    convert(llama, tmp_path / "deep" / "down" / "target")
    for folder in (tmp_path / "empty", tmp_path / "deep/down/target"):
        assert folder.stat().st_mode & 0o777 == 0o755
        bmojo.BMojoLM.load(folder)


def test_the_hub(llama, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == "no/network":
            raise OSError("no route to host\nmore")
        assert {"config.json", "*.safetensors", "tokenizer.json"} <= set(allow_patterns)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert convert("some/llama-1.5b", tmp_path / "ours").source_format == "llama"
    assert asked == ["some/llama-1.5b"]
    with pytest.raises(ConversionError, match=r"can't be fetched from the hub \(no route to host\); give a local"):
        convert("no/network", tmp_path / "other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'bmojo\[train\]'"):
        convert("some/llama", tmp_path / "other")


def test_gguf_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        convert(tmp_path / "model.gguf", tmp_path / "target")


def test_what_transformers_saves_of_state_space_models_is_read(tmp_path):
    """The default limit of steps of Mamba-2 and Bamba is infinite, which is written as an object."""
    sizes = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 2}
    mamba2 = Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1, state_size=4, chunk_size=4)
    bamba = BambaConfig(**sizes, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
                        attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4,
                        mamba_chunk_size=4)  # fmt: skip
    bamba.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    for config in (MambaConfig(**sizes, state_size=4), mamba2, bamba):
        theirs = shaken(AutoModelForCausalLM.from_config(config), dtype=torch.float32).eval()
        theirs.save_pretrained(tmp_path / config.model_type)
        convert(tmp_path / config.model_type, tmp_path / f"our {config.model_type}")
        tokens = draw_tokens(2, 20)
        with torch.no_grad():
            ours = bmojo.BMojoLM.load(tmp_path / f"our {config.model_type}")
            close(ours(tokens)[0], theirs(tokens, use_cache=False).logits, 1e-4)
        back = tmp_path / f"{config.model_type} again"
        convert(tmp_path / f"our {config.model_type}", back, to=config.model_type)
        with torch.no_grad():
            close(AutoModelForCausalLM.from_pretrained(back)(tokens, use_cache=False).logits, ours(tokens)[0], 1e-4)
        half = convert(tmp_path / config.model_type, tmp_path / f"half {config.model_type}", dtype=torch.bfloat16)
        assert half.dtype == "bfloat16, float32"  # decay rates and step sizes keep their digits


def test_a_window_is_not_made_wider(tmp_path, llama):
    convert(llama, tmp_path / "swa", window=16)
    with pytest.raises(ConversionError, match="window=64 can't be forced: it is wider than the model's own, 16"):
        convert(tmp_path / "swa", tmp_path / "wider", window=64)
