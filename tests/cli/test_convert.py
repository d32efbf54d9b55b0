from __future__ import annotations

import json

import pytest
import torch
from cases import make_model
from safetensors.torch import save_file

from bmojo import BMojoLM
from bmojo.config import ModelConfig
from bmojo.convert import export_model
from bmojo.data import read_documents, train_bpe
from bmojo.nn.count import parameters


@pytest.fixture
def llama(tmp_path, corpus):
    """A Llama whose vocabulary is padded beyond its tokenizer's, as they often are."""
    config = ModelConfig(
        vocab_size=272, hidden_size=8, intermediate_size=12, num_heads=2, pattern=("attention",), window=None
    )
    settings, tensors = export_model("llama", config, make_model(config, dtype=torch.float32).state_dict())
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    train_bpe(read_documents(str(corpus)), 265, folder / "tokenizer.json")
    return folder


def test_converts_generates_and_goes_back(llama, tmp_path, bmojo, corpus):
    ours, streaming, back = tmp_path / "ours", tmp_path / "streaming", tmp_path / "back"
    code, out, err = bmojo("convert", llama, ours)
    assert (code, err) == (0, "")
    config = BMojoLM.load(ours).config
    size = sum(path.stat().st_size for path in ours.iterdir()) / 1e6
    assert out == (
        f"{llama} was a llama model; {ours} is a bmojo model: 2 attention layers over the whole past, 8 wide, "
        f"a vocabulary of 272, {parameters(config):,} parameters in float32, {size:.1f} MB.\n"
    )
    assert bmojo("generate", ours, "--prompt", "Document", "--max-new-tokens", 5, "--temperature", 0)[0] == 0
    assert bmojo("eval", ours, "--text", corpus)[0] == 0
    code, out, err = bmojo("convert", ours, streaming, "--window", 64)
    assert code == 0
    assert "over a window of 64 tokens" in out
    assert BMojoLM.load(streaming).config.window == 64
    assert bmojo("convert", ours, back, "--to", "llama")[0] == 0
    assert (back / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_layers_with_a_window_and_without_are_told_apart(tmp_path, bmojo):
    ours, theirs, streaming = tmp_path / "ours", tmp_path / "theirs", tmp_path / "streaming"
    config = ModelConfig(hidden_size=8, num_heads=2, num_layers=5, pattern=("full", "attention"), qkv_bias=True)
    make_model(config, dtype=torch.float32).save(ours)
    kinds = "2 attention layers over a window of 64 tokens and 3 attention layers over the whole past, 8 wide"
    assert kinds in bmojo("convert", ours, theirs, "--to", "qwen2")[1]
    kinds = "5 attention layers over a window of 32 tokens, 8 wide"
    assert kinds in bmojo("convert", theirs, streaming, "--window", 32)[1]


def test_refuses(llama, tmp_path, refused):
    assert "is not an empty folder" in refused("convert", llama, llama)
    assert "unknown format 'lama'; did you mean 'llama'?" in refused("convert", llama, tmp_path / "x", "--to", "lama")
    assert "llama can't hold window=64" in refused("convert", llama, tmp_path / "x", "--to", "llama", "--window", 64)
    assert "there is no" in refused("convert", tmp_path / "none", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_is_too_small_is_taken_from_the_models_own_folder_alone(llama, tmp_path, bmojo, refused):
    bmojo("convert", llama, tmp_path / "ours" / "model")
    tokenizer = (tmp_path / "ours/model/tokenizer.json").rename(tmp_path / "ours/tokenizer.json")
    assert "tokenizer.json has 265 tokens; name the" in refused("generate", tmp_path / "ours", "--prompt", "a")
    tokenizer.rename(tmp_path / "ours/model/tokenizer.json")
    assert bmojo("generate", tmp_path / "ours", "--prompt", "a", "--max-new-tokens", 1)[0] == 0


def test_a_run_is_converted_with_its_tokenizer(tmp_path, bmojo, corpus, run_options):
    run, target = tmp_path / "run", tmp_path / "llama"
    train_bpe(read_documents(str(corpus)), 260, tmp_path / "bpe.json")
    plain = ["--preset", "transformer", "--tokenizer", tmp_path / "bpe.json"]
    options = run_options[: run_options.index("ssm_head_dim=16") - 1]
    assert bmojo("train", "--out", run, "--text", corpus, *plain, *options)[0] == 0
    assert bmojo("convert", run, target, "--to", "llama")[0] == 0
    assert (target / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
