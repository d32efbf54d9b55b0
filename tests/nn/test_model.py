"""The language model: checkpoints, states, errors, types."""

from __future__ import annotations

import json

import pytest
import torch
from cases import draw_tokens, make_model, small_preset
from safetensors.torch import load, save_file

from bmojo.errors import CheckpointError, ConfigError, StateError
from bmojo.nn.init import RESIDUAL_SCALE
from bmojo.nn.model import BMojoLM
from bmojo.presets import PRESETS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_model_comes_back_bit_identical(tmp_path, preset, dtype):
    model = make_model(small_preset(preset, tie_embeddings=preset != "swa"), dtype=dtype)
    model.save(tmp_path / "new" / "model")
    loaded = BMojoLM.load(tmp_path / "new" / "model")
    assert loaded.config == model.config
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {n: True for n, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype
        assert torch.equal(other, tensor), name
    tokens = draw_tokens(2, 11)
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        BMojoLM.load(tmp_path)
    model = make_model(small_preset("bmojo"), dtype=torch.float32)
    model.save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, content = config.read_text(), weights.read_bytes()

    for wrong, message in (
        ("{", "not JSON"),
        ("[]", "JSON object"),
        (json.dumps(json.loads(text) | {"windw": 8}), "did you mean 'window'"),
        (json.dumps(json.loads(text) | {"pattern": 5}), "is not a bmojo configuration"),
        (json.dumps({"model_type": "llama"}), "model_type must be 'bmojo', got 'llama'; use `bmojo convert`"),
        (json.dumps(json.loads(text) | {"format_version": 2}), "format_version is 2, this bmojo reads up to 1; update"),
    ):
        config.write_text(wrong)
        with pytest.raises(CheckpointError, match=message):
            BMojoLM.load(tmp_path)
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError):
        BMojoLM.load(tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"conv_size": 0, "admission": "innovation"}))
    with pytest.raises(CheckpointError, match=r"do not belong to its config\.json: blocks\.0\.mixer\.admission"):
        BMojoLM.load(tmp_path)
    config.write_text(text)

    for wrong in (content[:-50], b"", b"no weights at all"):
        weights.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="corrupt"):
            BMojoLM.load(tmp_path)
    save_file({**load(content), "norm.weight": torch.ones(3)}, weights)
    with pytest.raises(CheckpointError, match=r"norm\.weight is \(3,\), expected \(16,\)"):
        BMojoLM.load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        BMojoLM.load(tmp_path)


def test_what_does_not_fit_is_refused():
    model = make_model(small_preset("bmojo"))
    _, state = model(draw_tokens(2, 5))
    for wrong in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="whole numbers of shape"):
            model(wrong)
    with pytest.raises(StateError, match=r"batch size 2, the tokens 3; use state\.select"):
        model(draw_tokens(3, 1), state)
    with pytest.raises(StateError, match="eidetic_slots is 6 here and 5 in the state"):
        make_model(small_preset("bmojo", eidetic_slots=6, intermediate_size=16))(draw_tokens(2, 1), state)
    with pytest.raises(StateError, match="mask must have the shape"):
        model(draw_tokens(2, 3), mask=torch.ones(2, 4))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_state_is_no_state(preset):
    model = make_model(small_preset(preset))
    tokens = draw_tokens(2, 9)
    with torch.no_grad():
        expected, end = model(tokens)
        got, state = model(tokens, model.empty_state(2))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert state.layers[0].keys() == end.layers[0].keys() == model.empty_state(2).layers[0].keys()


@pytest.mark.parametrize("innovation", ["rls", "ema", "state", "head", "random", "first"])
def test_the_types_of_a_state_do_not_depend_on_how_it_came_about(innovation):
    for dtype in (torch.bfloat16, torch.float32):
        model = make_model(small_preset("bmojo", innovation=innovation), dtype=dtype)
        with torch.no_grad():
            empty, (_, parallel) = model.empty_state(1), model(draw_tokens(1, 9))
            _, continued = model(draw_tokens(1, 3), parallel)
            _, stepped = model(draw_tokens(1, 1), continued)
        states = (empty, parallel, continued, stepped)
        types = [{name: z.dtype for name, z in state.layers[0].items()} for state in states]
        assert types.count(types[0]) == 4


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # nn.RMSNorm, bfloat16 in, float32 weight
@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_keeps_states_and_scores_in_float32(preset):
    model = make_model(small_preset(preset), dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(draw_tokens(2, 22))
        logits, state = model(draw_tokens(2, 1), state)
    assert logits.isfinite().all()
    for layer in state.layers:
        for name in layer.keys() & {"ssm", "slot_score", "pending", "rls_A", "rls_M", "ema"}:
            assert layer[name].dtype == torch.float32, name


def test_initialisation_draws_what_it_says():
    torch.manual_seed(0)
    model = BMojoLM(small_preset("bmojo", hidden_size=256, ssm_head_dim=8, num_layers=1))
    ssm = model.blocks[0].mixer.ssm
    assert 0 <= ssm.A_log.min() <= ssm.A_log.max() <= torch.tensor(16.0).log()
    step = torch.nn.functional.softplus(ssm.dt_bias)
    assert 1e-3 * 0.99 <= step.min() <= step.max() <= 0.1 * 1.01
    for weight in (model.blocks[0].mixer.q_proj.weight, model.embed.weight):
        assert abs(float(weight.detach().std() * 16) - 1) < 0.02
    fixed = BMojoLM(small_preset("bmojo", hidden_size=256, ssm_head_dim=8, num_layers=1, initializer_range=0.02))
    assert abs(float(fixed.blocks[0].mlp.gate_up.weight.detach().std() / 0.02) - 1) < 0.02
    assert abs(float(fixed.blocks[0].mlp.down.weight.detach().std() / (0.02 * RESIDUAL_SCALE)) - 1) < 0.02
