"""Every block of docs/transformers.md runs, one after the other, and says what the page says."""

import re
from pathlib import Path

import pytest
import torch

from bmojo import BMojoLM

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_the_page_for_users(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "64 32 torch.bfloat16 torch.float32" in printed
    assert "Once upon a time" in printed
    assert re.search(r"BMojoCache\(31 tokens read, 1 rows, [\d,]+ bytes\)", printed)
    assert "trainable params" in printed
    assert (tmp_path / "trained" / "model.safetensors").is_file()
    assert (tmp_path / "trained" / "tokenizer_config.json").is_file()
    assert BMojoLM.load(tmp_path / "trained").config == names["model"].config.core
    assert names["answer"].shape[1] <= 28
