"""Universal training data for torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from bmojo.universal.machine import Machine
from bmojo.universal.sample import sample_outputs

IGNORED = -100


class UniversalDataset(IterableDataset):
    """Endless batches of what random programs print; for `DataLoader(dataset, batch_size=None, num_workers=...)`.

    Each item is a dict of int64 tensors [rows, length]: `input_ids`, the start token 2 and then bits; `labels`, the bit
    behind each token, IGNORED (-100) behind the end of an output. Position t of the labels is the answer to position t
    of the input: nothing is to be shifted. Batch `number` depends on the seed and its number alone; of W workers,
    worker w gives the batches w, w + W, w + 2W, ...

    The least loss is that of M_norm: see `sample_outputs`, which also explains the other settings.
    """

    def __init__(
        self,
        rows: int = 32,
        length: int = 256,
        machine: str | Machine = "bp7",
        depth: int = 64,
        steps: int = 1024,
        at_least: int = 1,
        seed: int = 0,
    ) -> None:
        self.rows, self.length, self.seed = rows, length, seed
        self.programs: dict[str, Any] = {
            "machine": machine,
            "n_bits": length,
            "depth": depth,
            "steps": steps,
            "at_least": at_least,
        }

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        draw = np.random.default_rng((self.seed, self.length, number))
        bits, lengths = sample_outputs(draw, self.rows, **self.programs)
        labels = torch.from_numpy(bits.astype(np.int64))
        input_ids = torch.cat([torch.full_like(labels[:, :1], 2), labels[:, :-1]], dim=1)
        silent = torch.arange(self.length) >= torch.from_numpy(lengths)[:, None]
        return {"input_ids": input_ids, "labels": labels.masked_fill(silent, IGNORED)}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return map(self.batch, count(first, step))
