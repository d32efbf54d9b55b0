import math

import numpy as np
import pytest
import torch
from torch import nn

from bmojo import BMojoLM, presets
from bmojo.data.synthetic import Needle
from bmojo.errors import ConfigError
from bmojo.eval.needle import draw_grid, needle_grid


class Reader(nn.Module):
    """Knows the byte that came after the last 8 bytes when they stood in the text before; 7 stands for a 3."""

    def __init__(self) -> None:
        super().__init__()
        self.config = presets.transformer("tiny", vocab_size=256)
        self.embed = nn.Embedding(1, 1)
        self.told = []

    def features(self, tokens, state=None, **_):
        rows = []
        for row in tokens.tolist():
            text, told = bytes(row), []
            for end in range(1, len(row) + 1):
                at = text.find(text[max(0, end - 8) : end])
                told.append(row[min(at + 8, len(row) - 1)])
            rows.append([ord("7") if token == ord("3") else token for token in told])
        return nn.functional.one_hot(torch.tensor(rows), 256).double(), None

    def logits(self, features):
        return 50 * features


def test_an_answer_is_right_as_a_whole_or_not_at_all():
    needles = [Needle(length=length, depth=depth, digits=4) for length in (96, 160) for depth in (0.0, 0.5)]
    cells = needle_grid(Reader(), needles, rows=24, batch_size=5)
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(n.length, n.depth) for n in needles]
    for cell, needle in zip(cells, needles, strict=True):
        parts = [needle.batch(2**32 + i, 16)["labels"][:, -4:] for i in range(2)]
        answers = np.concatenate(parts)[:24]
        right = (answers != ord("3")).all(1).mean()
        assert cell["exact"] == pytest.approx(right)
        low, high = cell["ci95"]
        assert low < right < high
        wrong = (answers == ord("3")).sum(1)
        assert cell["bits"] == pytest.approx(wrong.mean() * 50 / math.log(2), rel=1e-6)


def test_refuses_a_vocabulary_that_is_too_small():
    model = BMojoLM(presets.transformer("tiny", vocab_size=16, hidden_size=32, num_heads=2))
    with pytest.raises(ConfigError, match="vocab_size must be at least the task's 256, got 16"):
        needle_grid(model, [Needle(length=96)])


def test_a_grid_is_drawn_as_png():
    cells = [{"length": length, "depth": depth, "exact": depth} for length in (64, 128) for depth in (0.0, 1.0)]
    assert draw_grid(cells).startswith(b"\x89PNG")
