"""What is counted, by hand on small models, and at which rates."""

import pytest
import torch

from bmojo import presets
from bmojo.bench.floor import Rates, Work, decode_work, layer_work, measure_rates, model_work, op_work
from bmojo.nn.count import costs, layer_flops, mixer_parameters, parameters


def test_the_floor_is_work_over_rates():
    assert Rates(flops=2e9, bytes=1e6).seconds(Work(10**9, 3 * 10**6)) == pytest.approx(3.5)


def test_a_call_of_a_model_is_its_tokens_one_by_one():
    config = presets.bmojo("tiny", vocab_size=32)
    forward = model_work(config, batch=2, time=70, backward=False)
    assert forward.flops == 2 * sum(costs(config, [i])[1].flops[0] for i in range(70))
    numbers = parameters(config) + 2 * 2 * 70 * (2 * 128 + 32)  # layers' inputs and outputs, logits written and read
    assert forward.bytes == 4 * numbers
    assert model_work(config, batch=2, time=70, backward=True) == Work(3 * forward.flops, 3 * forward.bytes)


def test_a_layer_has_no_mlp():
    config = presets.mamba2("tiny")
    bare = config.replace(intermediate_size=0)
    work = layer_work(config, batch=1, time=3, backward=False)
    assert work.flops == sum(layer_flops(bare, "ssm", i) for i in range(3))
    assert work.bytes == 4 * (mixer_parameters(config, "ssm") + 2 * 3 * 128)


def test_decoding_reads_weights_and_state_for_each_token():
    config = presets.swa("tiny")
    total = costs(config, [500])[1]
    work = decode_work(config, context=500, tokens=10, batch=3)
    assert work == Work(30 * total.flops[0], 10 * (4 * parameters(config) + 3 * total.state_bytes[0]))


def test_an_op_moves_its_arguments_and_results():
    x = torch.zeros(5)
    assert op_work(7, x, x.long(), x, backward=True) == Work(3 * 14, 3 * (20 + 40 + 20))


def test_rates_are_those_of_the_fastest_run(monkeypatch):
    monkeypatch.setattr("bmojo.bench.floor.MATRIX", 8)
    monkeypatch.setattr("bmojo.bench.floor.COPIED", 16)
    times = iter([9.0, 4, 2, 3, 5, 6, 7, 9, 8, 8, 4, 5, 6, 7])
    rates = measure_rates(lambda run: (run(), next(times))[1], "cpu", torch.float32)
    assert rates == Rates(flops=2 * 8**3 / 2, bytes=2 * 16 * 4 / 4)
