import json

import pytest

from bmojo import presets
from bmojo.cli.info import _ranges, _short
from bmojo.nn.count import costs, parameters


def test_json_is_what_the_count_says(bmojo):
    code, out, err = bmojo("info", "--preset", "hybrid", "--size", "130m", "--set", "window=512", "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    config = presets.hybrid("130m", window=512)
    assert content["config"] == config.to_dict()
    assert content["total"]["parameters"] == parameters(config)
    layers, total = costs(config, [1024, 32768, 1048576])
    assert content["total"]["state_bytes"] == total.state_bytes
    assert [row["layers"] for row in content["layers"]] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert [row["flops"] for row in content["layers"]] == [layers[0].flops, layers[1].flops]


def test_table_groups_layers(bmojo):
    code, out, _ = bmojo("info", "--size", "370m")
    assert code == 0
    assert "0-23" in out
    assert f"{parameters(presets.bmojo('370m')):,}" in out
    assert "…" not in bmojo("info", "--preset", "hybrid", "--size", "1.4b")[1]


@pytest.mark.parametrize(
    ("layers", "text"),
    [([0], "0"), ([0, 1], "0,1"), ([0, 1, 2, 3], "0-3"), ([1, 3, 5, 7], "1,3,...,7"), ([0, 1, 3, 4], "0,1,3,4")],
)
def test_ranges(layers, text):
    assert _ranges(layers) == text


def test_short_numbers():
    units = (" B", " kB", " MB")
    assert [_short(n, units) for n in (12, 999, 999.9, 12345, 5e9)] == ["12 B", "999 B", "1 kB", "12.3 kB", "5e+03 MB"]


def test_refuses(refused):
    assert "unknown model 'bmoj'; did you mean 'bmojo'?" in refused("info", "--model", "bmoj")
    assert "unknown size '1b'" in refused("info", "--size", "1b")
    assert "window must be a positive multiple of chunk (256), got 100" in refused("info", "--set", "window=100")
