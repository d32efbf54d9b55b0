import math

import pytest

from bmojo.errors import ConfigError
from bmojo.train import TrainSettings

FIELDS = {"steps": 100, "batch_size": 4, "seq_len": 32}


def test_dict_round_trip_and_derived_warm_up():
    settings = TrainSettings(**FIELDS, betas=(0.8, 0.9), seed=3)
    assert TrainSettings(**settings.to_dict()) == settings
    assert settings.warmup_steps == 5
    assert settings.tokens_per_step == 128


def test_processes_share_a_batch_evenly_or_not_at_all():
    assert [TrainSettings(**FIELDS).rows_per_process(count) for count in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        ConfigError, match=r"a multiple of the number of processes \(3\), which share each batch, got 4"
    ):
        TrainSettings(**FIELDS).rows_per_process(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"min_learning_rate_ratio": 2}, "min_learning_rate_ratio must be at least 0 and at most 1, got 2"),
        ({"betas": (0.9, 1.5)}, "betas"),
        ({"warmup_steps": 101}, "warmup_steps must be at most steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**{**FIELDS, **change})


def test_learning_rate_rises_then_falls_to_its_share():
    settings = TrainSettings(**FIELDS, warmup_steps=10, min_learning_rate_ratio=0.2)
    ratios = [settings.learning_rate_ratio(step) for step in range(101)]
    assert ratios[:10] == [(step + 1) / 10 for step in range(10)]
    assert ratios[10] == 1
    assert ratios[10:] == sorted(ratios[10:], reverse=True)
    assert ratios[55] == pytest.approx(0.6)
    assert ratios[100] == pytest.approx(0.2)
