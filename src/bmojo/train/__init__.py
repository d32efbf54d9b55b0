"""Training: `train(model, rows, settings, folder)` on top of transformers.Trainer, resumable to the bit."""

from bmojo.train.loss import next_token_loss
from bmojo.train.settings import TrainSettings
from bmojo.train.trainer import TrainRecord, train

__all__ = ["TrainRecord", "TrainSettings", "next_token_loss", "train"]
