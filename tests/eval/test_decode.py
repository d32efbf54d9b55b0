import pytest
import torch

from bmojo import BMojoLM, presets
from bmojo.eval import decode_cost
from bmojo.nn.count import layer_state_bytes


@pytest.mark.parametrize("name", ["bmojo", "hybrid", "transformer"])
def test_state_bytes_equal_the_count(name):
    torch.manual_seed(0)
    config = presets.get(name, "tiny", hidden_size=32, num_heads=2, chunk_size=16, ssm_head_dim=16)
    costs = decode_cost(BMojoLM(config), [300, 40, 700], tokens_per_context=3, prefill_segment=128)
    assert [cost["context"] for cost in costs] == [40, 300, 700]
    for cost in costs:
        assert cost["state_bytes"] == sum(layer_state_bytes(config, kind, cost["context"]) for kind in config.kinds)
        assert 0 < cost["ms_per_token"] < 1000
