import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmojo import BMojoLM, files
from bmojo.compare import job as job_module
from bmojo.compare.job import Job, memory_sample, run
from bmojo.compare.profiles import PROFILES, Profile, RecallPlan, TextPlan
from bmojo.compare.results import read_results
from bmojo.data import TextData, load_tokenizer
from bmojo.errors import BMojoError, CheckpointError, ConfigError
from bmojo.train import TrainSettings

SMALL = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "num_layers": 1, "ssm_head_dim": 16,
         "window": 16, "chunk_size": 8}  # fmt: skip
NANO = Profile(
    text=TextPlan(
        size="tiny",
        train=TrainSettings(steps=6, batch_size=2, seq_len=48, checkpoint_every=2, log_every=2),
        changes=SMALL,
        eval_bytes=600,
        position_documents=2,
    ),
    recall=RecallPlan(
        size="tiny",
        train=TrainSettings(steps=5, batch_size=4, seq_len=32, checkpoint_every=2, log_every=1),
        changes=SMALL,
        eidetic_slots=8,
        pairs=4,
        few=2,
        keys=8,
        eval_rows=4,
    ),
)
MODELS = ("swa", "bmojo")
CONTEXTS = [16, 64]


class Notes:
    """A watcher that keeps the steps and losses of each model, and calls `stop` at one of the steps."""

    def __init__(self, stop_at=None, stop=None):
        self.steps, self.entries, self.stop_at, self.stop = {}, [], stop_at, stop

    def start(self, total):
        self.total = total

    def model(self, name, steps):
        self.name, self.steps[name] = name, []

    def step(self, step, loss):
        self.steps[self.name].append((step, loss))
        if (self.name, step) == self.stop_at:
            self.stop()

    def stage(self, what):
        pass

    def done(self, entry, work):
        self.entries.append((entry["name"], work))


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def use_nano(patch):
    patch.setitem(PROFILES, "nano", NANO)
    patch.setitem(PROFILES, "other", NANO)
    patch.setattr(job_module, "CONTEXTS", CONTEXTS)


@pytest.fixture(scope="module", autouse=True)
def nano():
    with pytest.MonkeyPatch.context() as patch:
        use_nano(patch)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"Document {i} tells of {i * i} ünd nothing else.\n" * (2 + i))
    return str(folder)


@pytest.fixture
def run_nano(text):
    """Run the job in a folder and return what the watcher noted."""

    def run_in(folder, watcher=None, **changes):
        return run_job(folder, text, watcher, **changes)

    return run_in


def run_job(folder, text, watcher=None, **changes):
    watcher = watcher or Notes()
    job = Job(folder=Path(folder), text=text, **{"profile": "nano", "models": MODELS, **changes})
    run(job, load_tokenizer("bytes"), watcher)
    return watcher


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """An uninterrupted run of both suites: folder, and what the watcher noted."""
    folder = tmp_path_factory.mktemp("compare") / "whole"
    return folder, run_job(folder, text)


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run that may be spoilt."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def outcome(folder, suites=("text", "recall")):
    """All that a seed decides of a run's results, by model."""
    models = read_results(folder / "results.json")["models"]
    kept = ("parameters", "tokens_trained", "eval", "configuration", "memory_sample")
    return {
        model["name"]: [model["train"]["loss"], [cost["state_bytes"] for cost in model["decode"]]]
        + [model.get(field) for field in kept]
        for model in models
        if model["suite"] in suites
    }


def content(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in Path(folder).rglob("*")}


def test_a_run_leaves_results_report_models_and_logs(whole):
    folder, notes = whole
    names = [f"{suite}/{model}" for suite in ("text", "recall") for model in MODELS]
    assert {path.name for path in folder.iterdir()} == {
        "job.json", "data", "text", "recall", "results.json", "report.html", "report.md", "figures"
    }  # fmt: skip
    results = read_results(folder / "results.json")
    assert [model["name"] for model in results["models"]] == names
    assert results["name"] == "whole"
    assert results["corpus"]["documents_train"] + results["corpus"]["documents_eval"] == 12
    assert (results["settings"]["train_length"], results["settings"]["recall_window"]) == (48, 16)
    assert list((folder / "figures").glob("*.png"))
    for name in names:
        assert name.partition("/")[2] in (folder / "report.md").read_text()
        assert {path.name for path in (folder / name).iterdir()} == {"model", "train.json", "tensorboard", "entry.json"}
        assert list((folder / name / "tensorboard").glob("events.*"))
        entry = json.loads((folder / name / "entry.json").read_text())
        assert sum(p.numel() for p in BMojoLM.load(folder / name / "model").parameters()) == entry["parameters"]
        assert [cost["context"] for cost in entry["decode"]] == CONTEXTS
    assert [step for step, _ in notes.steps["text/swa"]] == list(range(1, 7))
    assert [name for name, _ in notes.entries] == names
    assert notes.total == pytest.approx(sum(work for _, work in notes.entries))


def test_recall_says_where_each_question_is(whole):
    rows = read_results(whole[0] / "results.json")["models"][-1]["eval"]["recall"]
    found = [(row["length"], row["distance"], row["where"]) for row in rows]
    inside, beyond, longer = "inside the window", "beyond the window", "beyond the training length"
    assert found[:4] == [(32, 10, inside), (32, 8, inside), (32, 16, beyond), (32, 24, beyond)]
    assert found[4:] == [(64, 56, longer), (128, 120, longer)]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results_to_the_bit(whole, run_nano, tmp_path):
    folder, notes = whole
    assert run_nano(tmp_path / "again").steps == notes.steps
    assert outcome(tmp_path / "again") == outcome(folder)


@pytest.mark.slow
def test_another_seed_gives_other_losses(whole, run_nano, tmp_path):
    other = run_nano(tmp_path / "other", models=("swa",), seed=1).steps
    for name, steps in other.items():
        assert all(loss != before for (_, loss), (_, before) in zip(steps, whole[1].steps[name], strict=True))


@pytest.mark.slow
def test_all_models_see_the_same_batches(run_nano, tmp_path, monkeypatch):
    seen, train = [], job_module.train

    def recording(model, rows, settings, folder, **options):
        seen.append([])

        def recorded(i):
            row = rows(i)
            seen[-1].append(np.stack(list(row.values())))
            return row

        return train(model, recorded, settings, folder, **options)

    monkeypatch.setattr(job_module, "train", recording)
    run_nano(tmp_path / "run", models=("transformer", *MODELS))
    text, recall = seen[:3], seen[3:]
    for models, plan in ((text, NANO.text), (recall, NANO.recall)):
        assert [len(rows) for rows in models] == 3 * [plan.train.steps * plan.train.batch_size]
        for other in models[1:]:
            np.testing.assert_equal(other, models[0])


def test_one_suite_is_what_it_is_beside_the_other(whole, run_nano, tmp_path):
    run_nano(tmp_path / "recall", suites=("recall",))
    assert outcome(tmp_path / "recall") == outcome(whole[0], ("recall",))
    assert read_results(tmp_path / "recall" / "results.json")["corpus"] is None
    assert not (tmp_path / "recall" / "data").exists()
    assert (tmp_path / "recall" / "report.html").exists()


def check_it_goes_on(whole, run_nano, folder):
    """After a stop at step 5 of text/bmojo: only what is left is done, and gives what an uninterrupted run gives."""
    first = folder / "text/swa/entry.json"
    finished = first.stat().st_mtime_ns
    assert not (folder / "text/bmojo/entry.json").exists()
    steps = run_nano(folder, suites=("text",)).steps
    assert steps == {"text/swa": [], "text/bmojo": whole[1].steps["text/bmojo"][4:]}
    assert first.stat().st_mtime_ns == finished
    assert outcome(folder) == outcome(whole[0], ("text",))
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(whole, run_nano, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_nano(folder, Notes(("text/bmojo", 5), interrupt), suites=("text",))
    assert [model["name"] for model in read_results(folder / "results.json")["models"]] == ["text/swa"]
    check_it_goes_on(whole, run_nano, folder)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import pytest, torch
from test_job import Notes, kill, run_job, use_nano
torch.set_num_threads(1)
use_nano(pytest.MonkeyPatch())
run_job({folder!r}, {text!r}, Notes(("text/bmojo", 5), kill), suites=("text",))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(whole, run_nano, text, tmp_path):
    folder = tmp_path / "run"
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(folder), text=text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    check_it_goes_on(whole, run_nano, folder)


def test_a_finished_run_is_only_reported_again(whole, copy, run_nano):
    before = content(copy)
    assert not any(run_nano(copy).steps.values())
    after = content(copy)
    changed = {path.name for path in before if path.is_file() and before[path] != after[path]}
    assert changed <= {"results.json", "report.html", "report.md", *(p.name for p in (copy / "figures").iterdir())}
    assert outcome(copy) == outcome(whole[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"models": ("bmojo", "swa")}, r'models: \["swa", "bmojo"\] there, \["bmojo", "swa"\] here'),
        ({"suites": ("text",)}, "suites"),
        ({"profile": "other"}, 'profile: "nano" there, "other" here'),
        ({"text": "stdlib"}, "text"),
        ({"errors": "replace"}, "errors"),
    ],
)
def test_the_folder_of_another_job_is_refused_and_left_alone(whole, change, named, text):
    before = content(whole[0])
    with pytest.raises(CheckpointError, match=f"was made with another {named}.*; use another --name"):
        run_job(whole[0], **{"text": text, **change})
    assert content(whole[0]) == before


def test_other_settings_of_the_same_profile_are_refused(whole, run_nano, monkeypatch):
    longer = dataclasses.replace(NANO.text.train, steps=7)
    monkeypatch.setitem(
        PROFILES, "nano", Profile(text=TextPlan(**{**vars(NANO.text), "train": longer}), recall=NANO.recall)
    )
    with pytest.raises(CheckpointError, match="was made with another settings"):
        run_nano(whole[0])


@pytest.mark.parametrize("name", ["thesis.tex", "results.json"])
def test_a_foreign_folder_is_refused_and_left_alone(run_nano, tmp_path, name):
    (tmp_path / name).write_text("precious")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="holds something that is no comparison; use another --name"):
        run_nano(tmp_path)
    assert content(tmp_path) == before


def test_a_foreign_data_folder_is_refused_and_left_alone(run_nano, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "measured.csv").write_text("precious")
    before = content(tmp_path)
    with pytest.raises(BMojoError, match="holds other things than a token store"):
        run_nano(tmp_path)
    assert content(tmp_path) == before


def test_what_a_kill_while_reading_leaves_is_no_hindrance(run_nano, tmp_path):
    (tmp_path / ".data.half").mkdir()
    run_nano(tmp_path, models=("swa",), suites=("recall",))
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("damaged", "advice"), [("job.json", "another --name"), ("text/swa/entry.json", "delete it")])
def test_a_damaged_file_is_named(copy, run_nano, damaged, advice):
    (copy / damaged).write_text("{")
    with pytest.raises(CheckpointError, match=f"{damaged} can't be read: .*{advice}"):
        run_nano(copy)


def test_unequal_models_are_refused_before_anything_is_made(run_nano, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "TOLERANCE", 0.0)
    with pytest.raises(ConfigError, match="must be equal in parameters within 0%"):
        run_nano(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("swaa",)}, "unknown model 'swaa'; did you mean 'swa'"),
        ({"suites": ()}, "no suite chosen; known: recall, text"),
        ({"models": ("swa", "swa")}, "a model is named twice in swa,swa"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Job(folder=tmp_path, **change)


def test_a_disk_that_fills_up_while_reporting_costs_nothing(whole, copy, run_nano, monkeypatch):
    mkstemp = files.tempfile.mkstemp

    def full(prefix, **options):
        if prefix.startswith(".report"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return mkstemp(prefix=prefix, **options)

    for path in copy.glob("re*.*"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkstemp", full)
        with pytest.raises(BMojoError, match=r"can't write .*report\.md: No space left on device; .* stays valid"):
            run_nano(copy)
    assert outcome(copy) == outcome(whole[0])
    assert not any(run_nano(copy).steps.values())
    assert (copy / "report.html").exists()


def test_a_sample_shows_what_the_eidetic_memory_kept(whole):
    folder, _ = whole
    models = {model["name"]: model for model in read_results(folder / "results.json")["models"]}
    assert [name for name, model in models.items() if "memory_sample" in model] == ["text/bmojo"]
    sample = models["text/bmojo"]["memory_sample"]
    data = TextData(folder / "data")
    longest = bytes(data.eval[int(np.argmax(data.eval.lengths))][: job_module.SAMPLE_TOKENS])
    assert "".join(sample["text"]) == longest.decode(errors="ignore")
    slots = models["text/bmojo"]["configuration"]["eidetic_slots"]
    for i, layer in enumerate(sample["layers"]):
        assert layer["layer"] == i
        assert len(layer["innovation"]) == len(sample["text"]) == len(longest)
        assert 0 < len(layer["kept"]) <= slots
        assert layer["kept"] == sorted(set(layer["kept"]))
    model = BMojoLM.load(folder / "text/bmojo/model").eval()
    assert memory_sample(model, data, load_tokenizer("bytes")) == sample


@pytest.mark.slow
def test_a_run_goes_on_with_the_text_that_it_began_with(text, tmp_path):
    mine = tmp_path / "text"
    shutil.copytree(text, mine)
    with pytest.raises(KeyboardInterrupt):
        run_job(tmp_path / "run", str(mine), Notes(("text/bmojo", 3), interrupt), suites=("text",))
    before = TextData(tmp_path / "run" / "data").corpus_record()
    (mine / "0.txt").write_text("something else altogether\n" * 50)
    with pytest.warns(UserWarning, match="has changed; this run goes on with the text that it began with"):
        run_job(tmp_path / "run", str(mine), suites=("text",))
    assert read_results(tmp_path / "run" / "results.json")["corpus"] == before
