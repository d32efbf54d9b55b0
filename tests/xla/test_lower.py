"""The training step and the decode step as programs: equal to eager PyTorch, and of documented operators alone."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import VOCAB, draw_tokens, make_model, same_state, small_preset

from bmojo import lower
from bmojo.errors import ConfigError, MissingPackageError
from bmojo.memory.state import MemoryState
from bmojo.nn.init import parameter_groups
from bmojo.nn.loss import NO_LABEL
from bmojo.ops.dispatch import lowering_for
from bmojo.ops.numerics import widest
from bmojo.presets import PRESETS
from bmojo.train.loss import next_token_loss

BATCH, TIME, CONTEXT = 2, 10, 16  # two chunks of 4, and a half
CLOSE = 1e-5
RATE = 3e-3
presets = pytest.mark.parametrize("preset", PRESETS)
presets_slowly = pytest.mark.parametrize(
    "preset", [name if name == "bmojo" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)


@functools.cache
def model_of(preset):
    return make_model(small_preset(preset, num_layers=2 if preset == "hybrid" else 1), dtype=torch.float32)


@functools.cache
def program(preset, step):
    model = model_of(preset)
    match step:
        case "train":
            return lower.trace(*lower.training_step(model, batch=BATCH, time=TIME))
        case "prefill":
            return lower.trace(*lower.prefill(model, batch=BATCH, time=TIME, context=CONTEXT))
    return lower.trace(*lower.decode_step(model, batch=BATCH, context=CONTEXT))


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def eager_training(model, batches):
    """Losses, and the parameters after steps of `torch.optim.AdamW`."""
    model = make_model(model.config, dtype=torch.float32)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.1), lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for tokens, labels in batches:
        loss = next_token_loss(model, {"tokens": tokens, "labels": labels})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses, dict(model.named_parameters())


def check_training(run, preset):
    model, batches = model_of(preset), []
    for seed in range(3):
        tokens = draw_tokens(BATCH, TIME + 1, seed)
        labels = tokens[:, 1:].clone()
        labels[0, : 2 + seed] = NO_LABEL
        batches.append((tokens[:, :-1].clone(), labels))
    losses, parameters = eager_training(model, batches)
    state = lower.training_state(model)
    for (tokens, labels), loss in zip(batches, losses, strict=True):
        got, state = run(state, torch.tensor(RATE), tokens, labels)
        assert error(got, loss) < CLOSE
    for name, parameter in parameters.items():
        assert error(state["weights"][name], parameter.detach()) < CLOSE, name


@torch.no_grad()
def check_decoding(run, preset):
    model, tokens = model_of(preset), draw_tokens(BATCH, TIME)
    weights, state = lower.weights_of(model), model.empty_state(BATCH)
    layers = lower.decode_step(model, batch=BATCH, context=CONTEXT)[1][1]
    for t in range(TIME):
        expected, state = model(tokens[:, t : t + 1], state)
        logits, layers = run(weights, layers, tokens[:, t])
        assert logits.shape == (BATCH, VOCAB)
        assert error(logits, expected[:, 0]) < CLOSE, t
    if preset != "transformer":  # whose cache grows in other steps
        same_state(MemoryState(model.config, tuple(layers)), state, CLOSE)


@pytest.mark.slow
@presets
def test_training_step_compiled_by_xla_is_eager(preset):
    check_training(program(preset, "train").compile(), preset)


@presets_slowly
def test_decode_step_compiled_by_xla_is_eager(preset):
    check_decoding(program(preset, "decode").compile(), preset)


@presets_slowly
def test_exported_graphs_are_eager(preset):
    check_training(program(preset, "train").exported.module(), preset)
    check_decoding(program(preset, "decode").exported.module(), preset)


@pytest.mark.slow
@presets
def test_a_prefill_is_gone_on_from(preset):
    model, tokens = model_of(preset), draw_tokens(BATCH, TIME + 3)
    weights = lower.weights_of(model)
    with torch.no_grad():
        expected = model(tokens)[0]
    logits, layers = program(preset, "prefill").compile()(weights, tokens[:, :TIME])
    run = program(preset, "decode").compile()
    for t in range(TIME, TIME + 3):
        assert error(logits, expected[:, t - 1]) < CLOSE
        logits, layers = run(weights, layers, tokens[:, t])


@presets_slowly
@pytest.mark.parametrize("step", [pytest.param("train", marks=pytest.mark.slow), "decode"])
def test_every_operator_is_one_that_neuron_documents(preset, step):
    lowered = program(preset, step)
    assert lowered.undocumented() == []
    assert "f64" not in lowered.element_types()
    assert not [name for name in lowered.operators() if "custom_call" in name or "while" in name or "sort" in name]
    assert {"dot_general f32", "exponential"} <= lowered.operators().keys()


def test_what_is_not_documented_is_named():
    def step(x):
        return torch.linalg.cholesky_ex(x @ x.mT)[0], x.sort(-1)[0], (x > 0).any()

    undocumented = lower.trace(step, (torch.eye(3),)).undocumented()
    assert "sort" in undocumented
    assert "reduce or i1" in undocumented
    assert [name for name in undocumented if name.startswith("custom_call lapack")]


@pytest.mark.slow
def test_the_graph_of_a_decode_step_does_not_depend_on_the_context():
    sizes = [
        lower.trace(*lower.decode_step(model_of("transformer"), batch=1, context=context)).operators().total()
        for context in (256, 512)
    ]
    assert sizes[0] == sizes[1]


def test_full_attention_needs_a_context():
    with pytest.raises(ConfigError, match="needs a context"):
        lower.decode_step(model_of("transformer"), batch=1)


def test_devices_without_float64_keep_float32():
    x = torch.ones(2)
    assert widest(x).dtype == torch.float64
    with lowering_for("xla"):
        assert widest(x).dtype == torch.float32
    with pytest.raises(ZeroDivisionError), lowering_for("xla"):
        raise ZeroDivisionError
    assert widest(x).dtype == torch.float64


def test_jax_and_torchax_leave_others_as_they_are():
    fast, packet = torch.backends.mha.get_fastpath_enabled(), torch._ops.OpOverloadPacket.__getattr__
    jax, _ = lower._torchax()
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch._ops.OpOverloadPacket.__getattr__ is packet
    with pytest.raises(AttributeError):
        _ = torch.ops.aten.prod.dim_Dimname
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    assert not jax.config.jax_enable_x64


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jax", None)
    with pytest.raises(MissingPackageError, match=r"jax.*bmojo\[xla\]"):
        lower._torchax.__wrapped__()
