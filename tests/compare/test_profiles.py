import pytest

from bmojo import presets
from bmojo.compare.job import TOLERANCE, _config, require_equal
from bmojo.compare.profiles import PROFILES, get_profile
from bmojo.data import load_tokenizer
from bmojo.errors import ConfigError
from bmojo.nn.count import parameters

SUITES = [(name, suite) for name in PROFILES for suite in ("text", "recall")]


def configs_of(profile, suite):
    plan = getattr(get_profile(profile), suite)
    return {name: _config(plan, name, load_tokenizer("bytes")) for name in presets.PRESETS}


@pytest.mark.parametrize(("profile", "suite"), SUITES)
def test_the_models_have_equal_parameters(profile, suite):
    configs = configs_of(profile, suite)
    counts = [parameters(config) for config in configs.values()]
    assert len(counts) == len(presets.PRESETS)
    assert max(counts) <= 1.02 * min(counts)
    assert TOLERANCE == 0.02
    require_equal(suite, configs)


@pytest.mark.parametrize(("profile", "suite"), SUITES)
def test_the_models_differ_in_their_memories_alone(profile, suite):
    configs = configs_of(profile, suite)
    shapes = {
        (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads) for config in configs.values()
    }
    windows = {configs[name].window for name in ("swa", "hybrid", "bmojo_f", "bmojo")}
    assert len(shapes) == len(windows) == 1
    assert {configs[name].window for name in ("transformer", "mamba", "mamba2", "gdn")} == {None}
    assert [name for name, config in configs.items() if config.eidetic_slots] == ["bmojo"]


def test_unequal_models_are_refused():
    configs = configs_of("quick", "text")
    configs["swa"] = configs["swa"].replace(intermediate_size=configs["swa"].intermediate_size * 2)
    with pytest.raises(ConfigError, match=r"suite text must be equal in parameters within 2%, got .* \(swa\)"):
        require_equal("text", configs)


@pytest.mark.parametrize("profile", PROFILES)
def test_recall_is_asked_inside_the_window_beyond_it_and_beyond_the_training_length(profile):
    plan = get_profile(profile).recall
    window, length = plan.changes["window"], plan.train.seq_len
    asked = plan.distances(window)
    for task, distance in asked:
        batch = task.at_distance(distance, 2)
        assert batch["tokens"].shape == (2, task.length)
        assert batch["tokens"].max() < plan.task(plan.pairs).vocab_size
    trained_length = [distance for task, distance in asked if task.length == length]
    assert min(trained_length) < window < max(trained_length)
    assert {task.length // length for task, _ in asked} == {1, 2, 4}


@pytest.mark.parametrize("profile", PROFILES)
def test_text_is_scored_beyond_the_training_length(profile):
    plan = get_profile(profile).text
    assert plan.positions == sorted(set(plan.positions))
    assert plan.positions[0] < plan.train.seq_len < plan.positions[-1]


def test_an_unknown_profile_offers_the_nearest():
    with pytest.raises(ConfigError, match="unknown profile 'quik'; did you mean 'quick'"):
        get_profile("quik")
