"""What a grid expands to, what is refused, and how memories are sized."""

import dataclasses
import json

import pytest

from bmojo import presets
from bmojo.config import ModelConfig
from bmojo.data.synthetic import TASKS, make_task
from bmojo.errors import ConfigError, DataError
from bmojo.nn.count import layer_state_bytes, parameters
from bmojo.sweep.grid import settings_of
from bmojo.train import TrainSettings

SHAPE = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 256, "window": 16, "chunk_size": 16}


@pytest.mark.parametrize("task", TASKS)
def test_a_setting_has_one_owner(task):
    names = [{field.name for field in dataclasses.fields(of)} for of in (ModelConfig, TrainSettings, TASKS[task])]
    model, train, own = names
    assert model & train == set()
    assert train & own <= {"seed"}
    assert model & own <= {"vocab_size"}  # the task's, which the model's follows
    assert {"seed", "seq_len", "encode"}.isdisjoint(settings_of(task))
    kinds = {kind.removesuffix(" | None") for _, kind in settings_of(task).values()}
    assert kinds <= {"int", "float", "str", "bool", "tuple[str, ...]", "tuple[int, ...]", "tuple[float, float]"}


def test_every_combination_is_a_trial_of_its_own(make_sweep, axis):
    sweep = make_sweep(axis("pairs", 2, 4), axis("learning_rate", 1e-3, 3e-3), seeds=(0, 1))
    trials, notes = sweep.expand()
    assert notes == []
    assert len(trials) == len({trial.id for trial in trials}) == 16
    assert [t.settings.seed for t in trials] == [0] * 8 + [1] * 8
    trial = trials[-1]
    assert (trial.model, trial.varied) == ("bmojo", {"pairs": 4, "learning_rate": 3e-3})
    assert trial.config.vocab_size == make_task(**trial.tasks[0]).vocab_size
    assert trial.settings.seq_len == 48
    assert trial.tasks[0]["seed"] == 1
    assert trial.content == json.loads(json.dumps(trial.content))


def test_a_trial_is_the_same_in_any_grid(make_sweep, axis):
    one = {trial.id for trial in make_sweep(models=("bmojo",)).expand()[0]}
    many = {trial.id for trial in make_sweep(axis("pairs", 2, 4), axis("steps", 4, 5), seeds=(1, 0)).expand()[0]}
    assert one < many


def test_what_a_model_does_not_read_makes_no_trial(make_sweep, axis):
    slots, tests = axis("eidetic_slots", 0, 8), axis("innovation", "rls", "ema")
    models = ("transformer", "gdn", "bmojo_f", "bmojo")
    trials, _ = make_sweep(slots, tests, models=models).expand()
    assert [(trial.model, trial.varied) for trial in trials] == [
        ("transformer", {}),
        ("gdn", {}),
        ("bmojo_f", {}),
        ("bmojo", {"eidetic_slots": 0}),
        ("bmojo", {"eidetic_slots": 8, "innovation": "rls"}),
        ("bmojo", {"eidetic_slots": 8, "innovation": "ema"}),
    ]


def test_settings_may_change_together(make_sweep):
    coupled = ({"length": 32, "pairs": 2}, {"length": 64, "pairs": 4})
    trials, _ = make_sweep(coupled, models=("swa",)).expand()
    assert [(t.settings.seq_len, t.tasks[0]["pairs"]) for t in trials] == [(32, 2), (64, 4)]
    assert trials[0].name == "swa, length=32, pairs=2"


def test_batches_cycle_through_variants_and_each_is_scored(make_sweep, axis):
    train_on = axis("pairs", 2, 4), axis("power", 0.01, 1.0)
    asked = (*axis("length", 96, 48), {"length": 64, "pairs": 3})
    sweep = make_sweep(train_on=train_on, eval_on=asked, models=("swa",), without=["pairs"])
    (trial,), _ = sweep.expand()
    assert [(t["pairs"], t["power"]) for t in trial.tasks] == [(2, 0.01), (2, 1.0), (4, 0.01), (4, 1.0)]
    scored = [(t["length"], t["pairs"], t["power"]) for t in trial.evaluations]
    assert scored[0] == (48, 4, 1.0)  # what the last of the variants asks
    assert scored[1:] == [(48, 2, 0.01), (48, 2, 1.0), (48, 4, 0.01), (96, 4, 1.0), (64, 3, 1.0)]


@pytest.mark.parametrize("changes", [{}, {"conv_size": 4}, {"fading_span": 32}, {"innovation": "ema"},
                                     {"pattern": ("ssm", "attention")}])  # fmt: skip
def test_models_have_equal_parameters(make_sweep, axis, changes):
    fixed = {"intermediate_size": 256, "num_layers": 2, **changes}
    models = tuple(presets.PRESETS) if "pattern" not in changes else ("hybrid",)
    without = ["eidetic_slots"] if "pattern" in changes else []
    trials, notes = make_sweep(fixed=fixed, models=models, without=without).expand()
    counts = {trial.model: parameters(trial.config) for trial in trials}
    shape = {"vocab_size": trials[0].config.vocab_size, "hidden_size": 32, "num_heads": 2, "intermediate_size": 256}
    target = parameters(presets.transformer(**shape, num_layers=2))
    assert notes == []
    assert all(abs(count / target - 1) < 0.02 for count in counts.values()), (counts, target)


@pytest.mark.parametrize("nbytes", [100_000, 123_457, 262_144])
@pytest.mark.parametrize("name", presets.STATE_KNOBS)
def test_a_state_is_as_near_to_the_limit_as_its_knob_allows(name, nbytes):
    config, knob = presets.at_state(name, "tiny", nbytes, **SHAPE), presets.STATE_KNOBS[name]
    step = config.chunk_size if knob == "window" else 1
    next_one = presets.matched(name, "tiny", **{**SHAPE, knob: getattr(config, knob) + step})
    found = presets.state_bytes(config)
    assert found <= nbytes < presets.state_bytes(next_one)
    assert found == sum(layer_state_bytes(config, kind, 10**6) for kind in config.kinds)
    if knob != "window":
        assert found > 0.9 * nbytes


def test_an_unbounded_state_is_left_as_it_is():
    assert presets.at_state("transformer", "tiny", 1000, **SHAPE) == presets.matched("transformer", "tiny", **SHAPE)
    full = presets.at_state("hybrid", "tiny", 1000, **SHAPE | {"window": None})
    assert full == presets.matched("hybrid", "tiny", **SHAPE | {"window": None})
    with pytest.raises(ConfigError, match=r"the state of bmojo takes at least 78,\d+ bytes \(with eidetic_slots=1\)"):
        presets.at_state("bmojo", "tiny", 10_000, **SHAPE)


def test_state_bytes_are_an_axis_and_what_falls_short_is_named(make_sweep):
    sweep = make_sweep(models=("transformer", "swa", "gdn", "bmojo"), state_bytes=(7_000, 30_000),
                       fixed={"intermediate_size": 400})  # fmt: skip
    trials, notes = sweep.expand()
    assert [(t.model, t.varied.get("state_bytes")) for t in trials] == [
        ("transformer", None), ("swa", 7_000), ("gdn", 7_000), ("swa", 30_000), ("gdn", 30_000), ("bmojo", 30_000),
    ]  # fmt: skip
    for trial in trials[1:]:
        assert presets.state_bytes(trial.config) <= trial.varied["state_bytes"]
    told = "\n".join(notes)
    assert "transformer: its state grows with the sequence" in told
    assert "swa, state_bytes=7000: 4,112 bytes of state, 41% below 7,000" in told
    assert "left out: the state of bmojo takes at least" in told
    assert "gdn" not in told


def test_parameters_that_a_large_state_needs_are_named(make_sweep):
    _, notes = make_sweep(models=("gdn",), state_bytes=(60_000,)).expand()
    assert "ignored: window; no model of the sweep reads it" in notes
    assert notes[0].startswith("gdn: ")
    assert "parameters, the Transformer of that size has" in notes[0]


BAD = {
    "unknown task": ({"task": "mqr"}, (), "unknown task 'mqr'; did you mean 'mqar'"),
    "unknown model": ({"models": ("bmjo",)}, (), "unknown model 'bmjo'; did you mean 'bmojo'"),
    "unknown setting": ({}, ("windw", 16), "unknown setting 'windw'; did you mean 'window'"),
    "seed": ({}, ("seed", 0, 1), "seed can't be set: --seeds seeds task, weights and training alike"),
    "seq_len": ({}, ("seq_len", 32), "seq_len can't be set: it is the task's length"),
    "no values": ({}, ("pairs",), "the grid is empty: an axis must have at least one value"),
    "no models": ({"models": ()}, (), "the grid is empty: models must have at least one value"),
    "no seeds": ({"seeds": ()}, (), "the grid is empty: seeds must have at least one value"),
    "twice": ({}, ("pairs", 4, 4), "pairs must differ from each other, got {'pairs': 4} twice"),
    "model twice": ({"models": ("swa", "swa")}, (), "models must differ from each other, got swa twice"),
    "negative seed": ({"seeds": (-1,)}, (), "seeds must be at least 0, got -1"),
    "no rows": ({"eval_rows": 0}, (), "eval_rows must be at least 1, got 0"),
    "no bytes": ({"state_bytes": (0,)}, (), "state bytes must be at least 1, got 0"),
    "training length": ({"train_on": (({"length": 32}, {"length": 64}),)}, (), "the batches of one training have one"),
    "trained on a model's setting": ({"train_on": (({"window": 16},),)}, (), "unknown setting 'window'"),
    "too many pairs": ({}, ("pairs", 4, 9), "swa, pairs=9: pairs must be between 1 and the number of keys"),
    "bad window": ({}, ("window", 16, 20), "swa, window=20: window must be a positive multiple of chunk"),
    "bad rate": ({}, ("learning_rate", -1.0), "swa: learning_rate must be above 0"),
    "evaluation": ({"eval_on": ({"length": 8},)}, (), "swa: length must be at least"),
    "vocabulary": ({"eval_on": ({"keys": 64},)}, (), "vocab_size must be at least 73"),
    "vocabulary set": ({}, ("vocab_size", 5), "vocab_size must be at least 17"),
    "read by none": ({"models": ("gdn",)}, ("window", 16, 32), "window makes no difference: no model of the sweep"),
    "too small": ({"models": ("bmojo",), "state_bytes": (10,)}, (), "the grid is empty: left out: the state of bmojo"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "setting", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_trained_is_refused_before_anything_is(make_sweep, axis, changes, setting, message):
    with pytest.raises((ConfigError, DataError)) as caught:
        make_sweep(*([axis(*setting)] if setting else []), **changes).expand()
    assert message in str(caught.value)
