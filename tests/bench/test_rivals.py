"""Other libraries compute the same function, or the same sizes of it; where they are missing that is said."""

import sys

import pytest
import torch
import torch.nn.functional as F

from bmojo import BMojoLM, presets
from bmojo.bench import rivals
from bmojo.bench.contest import Missing
from bmojo.nn.mixer import Mixer
from bmojo.ops.gated_delta import gated_delta
from bmojo.ops.s6 import s6_naive

SMALL = {"hidden_size": 32, "num_heads": 2, "ssm_head_dim": 8, "vocab_size": 32, "chunk_size": 16}


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("preset", "family"), [("mamba2", "mamba2"), ("transformer", "llama")])
def test_models_of_transformers_have_our_sizes(preset, family):
    config = presets.get(preset, "tiny", **SMALL, intermediate_size=0 if preset == "mamba2" else 48)
    theirs = rivals.transformers_model(config, family, "cpu")
    assert size(theirs) == size(BMojoLM(config))
    cache = theirs(torch.zeros(1, 20, dtype=torch.int64), use_cache=True)
    cache = cache.past_key_values if family == "llama" else cache.cache_params
    if family == "llama":
        assert rivals.state_bytes(cache) == 2 * 2 * 20 * 32 * 4  # keys and values, layers, tokens, width, bytes
    else:
        assert rivals.state_bytes(cache) > 4 * 2 * config.ssm_size * config.ssm_state_size


@pytest.mark.parametrize(("make", "preset"), [(rivals.mamba2_layer, "mamba2"), (rivals.qwen3_next_layer, "gdn")])
def test_layers_have_our_sizes_and_run(make, preset):
    config = presets.get(preset, "tiny", **SMALL, intermediate_size=0)
    layer = make(config, "cpu")
    assert size(layer) == size(Mixer(config))
    x = torch.randn(2, 33, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_the_gated_delta_rule_is_ours_but_for_the_scale():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 48, 2, 8).unbind(0)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta, g = torch.rand(2, 48, 2), -torch.rand(2, 48, 2)
    ours = gated_delta(q, k, v, beta, g, chunk_size=16)[0]
    theirs = rivals.qwen3_gated_delta("cpu", 16)(q, k, v, beta, g)
    torch.testing.assert_close(theirs * 8**0.5, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mambapy", "associative_scan"])
def test_the_scans_of_mamba_are_ours(name):
    torch.manual_seed(0)
    x, dt = torch.randn(2, 20, 6), F.softplus(torch.randn(2, 20, 6))
    A_log, B, C = torch.randn(6, 4), torch.randn(2, 20, 4), torch.randn(2, 20, 4)
    op = rivals.mambapy_s6("cpu") if name == "mambapy" else rivals.associative_scan_s6("cpu", compiled=False)
    expected = s6_naive(x, dt, A_log, B, C, chunk_size=20)[0]
    torch.testing.assert_close(op(x, dt, A_log, B, C), expected, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.setitem(sys.modules, "mambapy.pscan", None)
    with pytest.raises(Missing, match="not installed: mambapy"):
        rivals.mambapy_s6("cpu")
    with pytest.raises(Missing, match="fla-core needs a CUDA device"):
        rivals.fla_gated_delta("cpu")


def test_versions_tell_what_is_not_there(monkeypatch):
    monkeypatch.setitem(rivals.PACKAGES, "nothing", "no-such-distribution-of-anyone")
    found = rivals.versions()
    assert found["transformers"]
    assert found["no-such-distribution-of-anyone"] is None
