from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import make_model
from safetensors.torch import save_file

from bmojo.config import ModelConfig
from bmojo.convert import export_model


def write_folder(folder: Path, settings: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in the layout of Transformers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def config() -> ModelConfig:
    """That of a small Llama."""
    return ModelConfig(
        vocab_size=260,
        hidden_size=8,
        intermediate_size=12,
        num_heads=2,
        num_kv_heads=1,
        pattern=("attention",),
        window=None,
    )


@pytest.fixture
def llama(tmp_path, config) -> Path:
    """The folder of a small Llama in float32."""
    model = make_model(config, dtype=torch.float32)
    return write_folder(tmp_path / "llama", *export_model("llama", config, model.state_dict()))


@pytest.fixture
def rewrite(llama):
    """Change settings of the Llama's config.json."""

    def change(**settings):
        path = llama / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return llama

    return change
