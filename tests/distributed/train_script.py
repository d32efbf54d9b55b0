"""`bmojo.train.train` of a small model: `train_script.py FOLDER LOSSES.json [HANG_AT]`, a step to hang at."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bmojo import BMojoLM, presets
from bmojo.train import TrainSettings, train

SETTINGS = TrainSettings(steps=12, batch_size=4, seq_len=24, checkpoint_every=5, log_every=4)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "window": 8, "chunk_size": 8,
         "ssm_head_dim": 16, "eidetic_slots": 4, "innovation": "head", "fading_span": 0}  # fmt: skip


def rows(i):
    """Rows with another number of labels in each; the last of every four has but one."""
    tokens = np.random.default_rng(i).integers(0, 64, 25)
    labels = tokens[1:].copy()
    labels[: 23 if i % 4 == 3 else i % 20] = -100
    return {"tokens": tokens[:-1], "labels": labels}


def run(folder, hang_at=None):
    """The model, the record, and the losses by step of this part. SMALL has parameters without a gradient."""
    torch.manual_seed(0)
    model, losses = BMojoLM(presets.bmojo("tiny", **SMALL)), {}

    def on_step(step, loss):
        losses[step] = loss
        if step == hang_at:
            time.sleep(600)

    record = train(model, rows, SETTINGS, folder, on_step=on_step, tensorboard=False)
    return model, record, losses


if __name__ == "__main__":
    folder, results, *hang_at = sys.argv[1:]
    losses = run(Path(folder), *map(int, hang_at))[2]
    if losses:  # the first process alone is told
        Path(results).write_text(json.dumps(losses))
