"""Trials are run once, by whoever comes first, and go on where they were."""

import json
import os
import shutil
import signal
import time

import pytest
from filelock import FileLock

from bmojo import BMojoLM
from bmojo.data.synthetic import make_task
from bmojo.errors import BMojoError, CheckpointError
from bmojo.sweep import job as job_module
from bmojo.sweep import trials as trials_module
from bmojo.sweep.job import Job
from bmojo.sweep.trials import facts_kept


def outcome(results):
    """All that a seed decides, by trial."""
    kept = ("model", "varied", "seed", "parameters", "state_bytes", "facts_kept", "evaluations", "settings")
    return {t["id"]: [t["train"]["loss"], *(t[name] for name in kept)] for t in results["trials"]}


def work(job):
    """What it tells."""
    lines = []
    job.work(lines.append)
    return lines


@pytest.fixture(scope="module")
def grid(make_sweep, axis):
    return make_sweep(axis("pairs", 2, 4), eval_on=axis("length", 96))


@pytest.fixture(scope="module")
def whole(grid, tmp_path_factory):
    """A finished sweep, and what it told."""
    job = Job(grid, tmp_path_factory.mktemp("sweep") / "whole")
    return job, work(job)


def test_what_a_sweep_leaves(whole, grid):
    job, lines = whole
    results = json.loads((job.folder / "results.json").read_text())
    assert results == job.results() | {"created": results["created"]}
    assert len(results["trials"]) == results["planned"] == 4
    assert results["varied"] == ["pairs"]
    assert results["fixed"]["window"] == 16
    for trial, result in zip(job.trials, results["trials"], strict=True):
        assert result["id"] == trial.id
        assert result["configuration"] == trial.config.to_dict()
        assert [score["task"]["length"] for score in result["evaluations"]] == [48, 96]
        assert all(0 <= score["accuracy"] <= 1 for score in result["evaluations"])
        assert (result["facts_kept"] is not None) == (trial.model == "bmojo")
        folder = job.folder_of(trial)
        assert make_task(**json.loads((folder / "task.json").read_text())).pairs == trial.varied["pairs"]
        assert BMojoLM.load(folder / "model").config == trial.config
    assert lines[0].startswith("1/4 swa, pairs=2, seed 0: accuracy 0.")
    assert lines[-1].startswith("4/4 bmojo, pairs=4, seed 0: accuracy 0.")


def test_what_is_finished_is_not_run_again(whole, grid, make_sweep, axis, monkeypatch):
    job, _ = whole
    ran = []
    monkeypatch.setattr(job_module, "run_trial", lambda trial, *_: ran.append(trial) or pytest.fail("ran"))
    assert work(Job(grid, job.folder)) == []
    monkeypatch.setattr(job_module, "run_trial", lambda trial, *rest: ran.append(trial) or run(trial, *rest))
    run = trials_module.run_trial
    more = Job(make_sweep(axis("pairs", 2, 3), models=("swa",)), job.folder)
    assert len(work(more)) == 1
    assert [trial.varied["pairs"] for trial in ran] == [3]
    assert [t["varied"]["pairs"] for t in more.results()["trials"]] == [2, 3]


def test_another_evaluation_is_made_without_training(whole, make_sweep, axis, monkeypatch):
    job, _ = whole
    before = outcome(job.results())
    asked = Job(make_sweep(axis("pairs", 2, 4), eval_on=axis("length", 96, 64)), job.folder)
    monkeypatch.setattr(trials_module, "train", lambda *_, **__: pytest.fail("trains"))
    assert len(work(asked)) == 4
    scores = asked.results()["trials"][0]["evaluations"]
    assert [score["task"]["length"] for score in scores] == [48, 96, 64]
    assert outcome(job.results()) == before


def test_a_trial_that_another_runs_is_left_to_it_and_taken_over_if_it_dies(grid, tmp_path, whole):
    job = Job(grid, tmp_path / "run")
    (job.folder / "locks").mkdir(parents=True)
    other = FileLock(job.folder / "locks" / job.trials[0].id)
    other.acquire()
    lines = []

    def tell(line):
        lines.append(line)
        if len(lines) == 3:
            other.release()

    job.work(tell)
    assert [line.partition(", seed")[0] for line in lines] == [
        "1/4 bmojo, pairs=2", "2/4 swa, pairs=4", "3/4 bmojo, pairs=4", "4/4 swa, pairs=2",
    ]  # fmt: skip
    assert outcome(job.results()) == outcome(whole[0].results())


def test_a_trial_that_diverges_does_not_stop_the_others(make_sweep, axis, tmp_path):
    sweep = make_sweep(axis("learning_rate", 1e30, 1e-3), fixed={"grad_clip": 0.0}, models=("swa",))
    job = Job(sweep, tmp_path / "run")
    lines = work(job)
    assert "1/2 swa, learning_rate=1e+30, seed 0: failed: the loss is nan at step" in lines[0]
    assert lines[1].startswith("2/2 swa, learning_rate=0.001, seed 0: accuracy")
    failed, trained = job.results()["trials"]
    assert "lower learning rate" in failed["failed"]
    assert "evaluations" in trained
    assert work(job) == []


def test_the_systems_failures_are_no_results(grid, tmp_path, monkeypatch):
    def full(*_, **__):
        raise BMojoError("can't write: no space left") from OSError(28, "No space left on device")

    monkeypatch.setattr(trials_module, "train", full)
    job = Job(grid, tmp_path / "run")
    with pytest.raises(BMojoError, match="no space left"):
        job.work(pytest.fail)
    assert job.results()["trials"] == []


def test_a_folder_of_something_else_is_refused(grid, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something that is no sweep; use another --name"):
        Job(grid, tmp_path)


def test_a_new_setting_makes_no_other_trial_but_a_new_default_does(whole, grid, monkeypatch, tmp_path):
    job, _ = whole
    folder = tmp_path / "run"
    shutil.copytree(job.folder, folder)
    path = folder / "trials" / job.trials[0].id / "entry.json"
    entry = json.loads(path.read_text())
    del entry["trial"]["configuration"]["positions"]  # of a version without it
    path.write_text(json.dumps(entry))
    assert work(Job(grid, folder)) == []
    entry["trial"]["configuration"]["rope_theta"] = 500.0  # the default then
    path.write_text(json.dumps(entry))
    with pytest.raises(CheckpointError, match=r"made with rope_theta=500.0, which is now 10000.0 if left out"):
        work(Job(grid, folder))


def test_a_damaged_entry_is_named(whole, grid, tmp_path):
    job = Job(grid, tmp_path / "run")
    path = job.folder_of(job.trials[0]) / "entry.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"entry\.json can't be read: .*delete it"):
        job.work(pytest.fail)


def test_facts_kept_is_the_share_of_the_facts_in_the_slots(make_sweep):
    """With more slots than tokens everything before the last chunk is kept, and with none nothing."""
    (trial,), _ = make_sweep(fixed={"eidetic_slots": 64, "eidetic_threshold": 0.0}, models=("bmojo",)).expand()
    task = make_task(**trial.tasks[0])
    assert facts_kept(BMojoLM(trial.config).eval(), task) == [1.0]
    none = trial.config.replace(eidetic_slots=0)
    assert facts_kept(BMojoLM(none).eval(), task) is None
    blind = trial.config.replace(eidetic_threshold=2.0)
    assert facts_kept(BMojoLM(blind).eval(), task) == [0.0]


@pytest.mark.slow
def test_workers_that_are_killed_go_on_and_come_to_what_one_comes_to(start_sweep, tmp_path, make_sweep, axis):
    sweep = make_sweep(axis("pairs", 2, 4), fixed={"steps": 200, "checkpoint_every": 20})
    alone = Job(sweep, tmp_path / "alone")
    work(alone)
    folder = tmp_path / "killed"
    running = start_sweep(folder, "--workers", "2")
    deadline = time.monotonic() + 90
    while not list(folder.glob("trials/*/checkpoints/*/complete")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    begun = Job(sweep, folder)
    assert not all(map(begun.finished, begun.trials))
    again = start_sweep(folder, "--workers", "2")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert outcome(begun.results()) == outcome(alone.results())
    assert "## pairs 2" in out
    assert "4/4 " in err


@pytest.mark.slow
def test_ctrl_c_stops_all_workers_cleanly(start_sweep, tmp_path):
    running = start_sweep(tmp_path / "run", "--workers", "2")
    deadline = time.monotonic() + 90
    while not list((tmp_path / "run").glob("trials/*/checkpoints/*/complete")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "bmojo: stopped; run the same command again to go on"
    assert "Traceback" not in err


@pytest.mark.slow
def test_torchrun_starts_workers(start_sweep, tmp_path, make_sweep, axis):
    running = start_sweep(tmp_path / "run", torchrun=2)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert out.count("## pairs 2") == 1
    job = Job(make_sweep(axis("pairs", 2, 4), fixed={"steps": 200, "checkpoint_every": 20}), tmp_path / "run")
    assert all(map(job.finished, job.trials))
    assert {t["settings"]["batch_size"] for t in job.results()["trials"]} == {4}
