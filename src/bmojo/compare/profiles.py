"""How much work `bmojo compare` does: what each profile trains, on what, and what it measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bmojo.data.synthetic.mqar import MQAR
from bmojo.errors import ConfigError, nearest
from bmojo.train.settings import TrainSettings

CONTEXTS = [256, 1024, 4096, 16384, 32768]  # tokens; where decoding is timed


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    size: str
    train: TrainSettings
    changes: dict[str, Any] = field(default_factory=dict)  # of every preset
    eval_bytes: int
    position_documents: int

    @property
    def positions(self) -> list[int]:
        """From a quarter of the training length to 8 times it."""
        return [self.train.seq_len * 2**n // 4 for n in range(6)]


@dataclass(frozen=True, kw_only=True)
class RecallPlan:
    """MQAR with `pairs` pairs, every fourth batch with `few` of them, so that near questions are asked too."""

    size: str
    train: TrainSettings
    changes: dict[str, Any]
    eidetic_slots: int
    pairs: int
    few: int
    keys: int
    eval_rows: int

    def task(self, pairs: int, times: int = 1) -> MQAR:
        """The task with `pairs` pairs in `times` the training length."""
        return MQAR(
            length=times * self.train.seq_len, pairs=pairs, keys=self.keys, values=self.keys, seed=self.train.seed
        )

    def distances(self, window: int) -> list[tuple[MQAR, int]]:
        """What is asked: inside the window, beyond it, and beyond the training length."""
        length = self.train.seq_len
        near = window // 4 * 2 + 2
        asked = [(self.task(self.few), max(near, 2 * self.few))]
        first, last = 2 * self.pairs, length - 2 * self.pairs
        asked += [(self.task(self.pairs), distance) for distance in (first, (first + last) // 4 * 2, last)]
        asked += [(self.task(self.pairs, times), times * length - 2 * self.pairs) for times in (2, 4)]
        return asked


@dataclass(frozen=True, kw_only=True)
class Profile:
    text: TextPlan
    recall: RecallPlan


def _recall(
    size: str, *, steps: int, batch_size: int, seq_len: int, pairs: int, keys: int, **changes: Any
) -> RecallPlan:
    return RecallPlan(
        size=size,
        train=TrainSettings(steps=steps, batch_size=batch_size, seq_len=seq_len, checkpoint_every=100),
        changes=changes,
        eidetic_slots=2 * pairs,
        pairs=pairs,
        few=4,
        keys=keys,
        eval_rows=64,
    )


PROFILES: dict[str, Profile] = {
    "quick": Profile(
        text=TextPlan(
            size="tiny",
            train=TrainSettings(steps=240, batch_size=8, seq_len=512, learning_rate=6e-3, checkpoint_every=60),
            eval_bytes=2**17,
            position_documents=8,
        ),
        recall=_recall(
            "tiny",
            steps=300,
            batch_size=32,
            seq_len=192,
            pairs=24,
            keys=128,
            hidden_size=64,
            num_heads=2,
            intermediate_size=128,
            window=16,
            chunk_size=16,
        ),
    ),
    "small": Profile(
        text=TextPlan(
            size="mini",
            train=TrainSettings(steps=1200, batch_size=8, seq_len=512, learning_rate=2e-3, checkpoint_every=100),
            eval_bytes=2**19,
            position_documents=16,
        ),
        recall=_recall(
            "tiny",
            steps=1200,
            batch_size=32,
            seq_len=256,
            pairs=32,
            keys=256,
            hidden_size=64,
            num_heads=2,
            intermediate_size=128,
            window=16,
            chunk_size=16,
        ),
    ),
    "full": Profile(
        text=TextPlan(
            size="130m",
            train=TrainSettings(steps=20000, batch_size=32, seq_len=2048, learning_rate=6e-4, checkpoint_every=500),
            changes={"window": 512},
            eval_bytes=2**22,
            position_documents=64,
        ),
        recall=_recall(
            "tiny",
            steps=20000,
            batch_size=256,
            seq_len=512,
            pairs=64,
            keys=4096,
            hidden_size=128,
            num_heads=2,
            intermediate_size=256,
            window=32,
            chunk_size=32,
        ),
    ),
}


def get_profile(name: str) -> Profile:
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}; {nearest(name, PROFILES)}")
    return PROFILES[name]
