import json
from itertools import pairwise

import pytest

SMALL = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "intermediate_size": 64, "ssm_head_dim": 16, "window": 16,
         "chunk_size": 16, "steps": 2, "batch_size": 2, "length": 48, "pairs": 4, "keys": 8, "values": 8}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(*arguments, task="mqar"):
    """A command line with the settings of SMALL that it does not set itself."""
    given = {name for argument in arguments for name in argument.partition("=")[0].split("/")}
    given -= {argument.partition("=")[0] for option, argument in pairwise(arguments) if option.endswith("-on")}
    kept = [part for name, value in SMALL.items() if name not in given for part in ("--set", f"{name}={value}")]
    return ["sweep", task, "--models", "swa,bmojo", "--eval-rows", "4", *kept, *arguments]


def test_a_sweep_over_layers_with_storage(bmojo, in_a_folder_of_its_own):
    code, _, err = bmojo(*sweep("--set", "storage_layers=-1", "--set", "storage_block=16", "--json"))
    assert code == 0, err
    results = json.loads((in_a_folder_of_its_own / "runs/sweep/mqar/results.json").read_text())
    assert "storage_layers" in json.dumps(results)


def test_trains_prints_the_table_and_says_where_it_is(bmojo, in_a_folder_of_its_own):
    code, out, err = bmojo(*sweep("--set", "pairs=2,4", "--train-on", "power=0.1,1", "--eval-on", "length=96"))
    assert code == 0, err
    assert [line.partition(", seed 0: accuracy")[0] for line in err.splitlines()] == [
        "1/4 swa, pairs=2", "2/4 bmojo, pairs=2", "3/4 swa, pairs=4", "4/4 bmojo, pairs=4"
    ]  # fmt: skip
    assert "## pairs 2 (chance 0.125)" in out
    assert "in runs/sweep/mqar: results.json, table.md, figures/" in out
    folder = in_a_folder_of_its_own / "runs/sweep/mqar"
    assert (folder / "table.md").read_text() in out
    assert {path.name for path in (folder / "figures").iterdir()} >= {"by_pairs.png", "by_length_asked.png"}
    again = bmojo(*sweep("--set", "pairs=2,4", "--train-on", "power=0.1,1", "--eval-on", "length=96", "--json"))
    assert again[0] == 0
    assert again[2] == ""
    assert json.loads(again[1]) == json.loads((folder / "results.json").read_text())


@pytest.mark.filterwarnings("always")
def test_values_are_of_the_declared_types(bmojo):
    settings = ["pattern=attention+ssm,bmojo", "num_layers=2", "betas=0.9+0.95", "length/pairs=48/4,64/2",
                "tie_sources=false", "eidetic_slots=0", "fading_span=0"]  # fmt: skip
    given = [part for setting in settings for part in ("--set", setting)]
    code, out, err = bmojo(*sweep("--models", "bmojo", *given, "--json"))
    assert code == 0, err
    trials = json.loads(out)["trials"]
    assert [t["varied"] for t in trials] == [
        {"pattern": list(pattern), "length": length, "pairs": pairs}
        for pattern in (["attention", "ssm"], ["bmojo"])
        for length, pairs in ((48, 4), (64, 2))
    ]
    assert trials[0]["settings"]["betas"] == [0.9, 0.95]
    assert "ignored: tie_sources; no model of the sweep reads it" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "pairs"], "--set takes NAME=VALUE,VALUE,..., got 'pairs'"),
        (["--eval-on", "pairs"], "--eval-on takes NAME=VALUE,VALUE,..., got 'pairs'"),
        (["--set", "pears=3"], "unknown setting 'pears'; did you mean 'pairs'?"),
        (["--set", "pairs=x"], "pairs must be a whole number, got 'x'"),
        (["--set", "length/pairs=48/4,64"], "--set length/pairs takes values of 2 parts with / between, got '64'"),
        (["--set", "pairs="], "the grid is empty"),
        (["--set", "seed=1"], "--seeds seeds task, weights and training alike"),
        (["--set", "learning_rate=fast"], "learning_rate must be a number, got 'fast'"),
        (["--set", "betas=0.9"], "betas must be two numbers"),
        (["--seeds", "a"], "--seeds must be a whole number, got 'a'"),
        (["--state-bytes", "64K"], "--state-bytes must be a whole number, got '64K'"),
        (["--state-bytes", ""], "--state-bytes must have at least one value"),
        (["--models", "bmjo"], "unknown model 'bmjo'"),
        (["--train-on", "window=16"], "unknown setting 'window'"),
        (["--eval-on", "length=8"], "length must be at least"),
        (["--workers", "0"], "--workers"),
        (["--name", "a", "--out", "b"], "give it or --out, not both"),
        (["--size", "tinny"], "unknown size 'tinny'; did you mean 'tiny'?"),
    ],
)
def test_what_cannot_be_used_is_refused_and_makes_nothing(refused, in_a_folder_of_its_own, arguments, message):
    assert message in refused(*sweep(*arguments))
    assert not list(in_a_folder_of_its_own.iterdir())


def test_an_unknown_task_is_refused(refused):
    assert "unknown task 'mqr'; did you mean 'mqar'?" in refused(*sweep(task="mqr"))
    assert "mqar needs the setting 'length'" in refused("sweep", "mqar")


@pytest.mark.filterwarnings("always")
def test_what_must_be_known_of_the_results_is_told(bmojo):
    code, _, err = bmojo(*sweep("--models", "transformer,swa", "--state-bytes", "5000"))
    assert code == 0
    assert "bmojo: warning: transformer: its state grows with the sequence, and is left as it is" in err
    assert "bmojo: warning: swa: 4,112 bytes of state, 18% below 5,000" in err
