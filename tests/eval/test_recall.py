import pytest
import torch
from torch import nn

from bmojo import BMojoLM, presets
from bmojo.data.synthetic.mqar import MQAR
from bmojo.errors import ConfigError, DataError
from bmojo.eval import recall

TASK = MQAR(length=64, pairs=3, keys=8, values=8)


class Oracle(nn.Module):
    """Looks up the token after the first time that it saw this one; its features are the answers' one-hot codes."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.config = presets.transformer("tiny", vocab_size=TASK.vocab_size)
        self.embed = nn.Embedding(1, 1)
        self.wrong = wrong

    def features(self, tokens):
        first = (tokens[:, :, None] == tokens[:, None, :]).int().argmax(-1)
        answer = tokens.roll(-1, 1).gather(1, first)
        answer[: self.wrong] = TASK.filler
        return nn.functional.one_hot(answer, TASK.vocab_size).float(), None

    def logits(self, features):
        return features


def test_counts_right_answers():
    assert recall(Oracle(0), TASK, [6, 30], rows=10, batch_size=4) == [
        {"distance": distance, "pairs": 3, "accuracy": 1.0, "chance": 1 / 8, "length": 64} for distance in (6, 30)
    ]
    (score,) = recall(Oracle(2), TASK, [6], rows=10, batch_size=10)
    assert score["accuracy"] == 0.8


def test_an_untrained_model_guesses_and_batches_do_not_matter():
    torch.manual_seed(0)
    model = BMojoLM(presets.bmojo("tiny", vocab_size=TASK.vocab_size, hidden_size=32, num_heads=2, ssm_head_dim=16))
    scores = recall(model, TASK, [6, 58], rows=32)
    assert scores == recall(model, TASK, [6, 58], rows=32, batch_size=32)
    assert all(score["accuracy"] < 0.4 for score in scores)


def test_refuses_what_does_not_fit():
    model = BMojoLM(presets.transformer("tiny", vocab_size=16, hidden_size=32, num_heads=2))
    with pytest.raises(ConfigError, match="vocab_size must be at least the task's 17, got 16"):
        recall(model, TASK, [6])
    with pytest.raises(DataError, match="distance must be even"):
        recall(Oracle(0), TASK, [7])
