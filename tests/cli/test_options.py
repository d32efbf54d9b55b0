import pytest

from bmojo import presets
from bmojo.cli.options import parse_settings, warn_unused
from bmojo.errors import ConfigError


def test_values_have_the_types_of_the_fields():
    pairs = ["window=none", "num_layers=3", "rope_theta=1e6", "qk_norm=True", "pattern=ssm, bmojo", "ssm=gdn"]
    assert parse_settings(pairs) == {
        "window": None,
        "num_layers": 3,
        "rope_theta": 1e6,
        "qk_norm": True,
        "pattern": ("ssm", "bmojo"),
        "ssm": "gdn",
    }
    assert parse_settings(None) == {}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("window", "--set takes key=value, got 'window'"),
        ("windows=3", "unknown setting 'windows'; did you mean 'window'"),
        ("window=3.5", r"window must be a whole number or none, got '3\.5'"),
        ("num_layers=none", "num_layers must be a whole number, got 'none'"),
        ("norm_eps=tiny", "norm_eps must be a number, got 'tiny'"),
        ("qk_norm=1", "qk_norm must be true or false, got '1'"),
    ],
)
def test_refuses(pair, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings([pair])


def test_settings_that_no_layer_reads_are_warned_of():
    config = presets.swa("tiny", innovation="ema")
    with pytest.warns(UserWarning, match=r"ignored: innovation; no layer of this model \(attention\) reads it"):
        warn_unused(config, {"innovation": "ema", "window": 64})
    warn_unused(presets.bmojo("tiny"), {"innovation": "ema"})
