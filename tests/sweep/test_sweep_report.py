"""Every figure that a grid can have, and the table, from made-up results."""

import random
import struct

import pytest

from bmojo.data.synthetic import make_task, task_record
from bmojo.sweep import report
from bmojo.sweep.report import write_report

STATE = {"transformer": 90_000, "swa": 8_000, "bmojo": 40_000}


def trial(model, seed, varied, reach=0.5, length=128):
    noise = random.Random(f"{model}{seed}{varied}")
    fields = {"length": length, "pairs": varied.get("pairs", 8), "seed": seed}
    asked = [fields, {**fields, "length": 256}, {**fields, "filler": "noise"}]

    def score(fields):
        accuracy = min(1.0, reach + noise.uniform(0, 0.3))
        bins = [[2**n, 2 ** (n + 1), accuracy * (1 - n / 16), 40] for n in range(1, 7)]
        return {"task": task_record(make_task("mqar", **fields)), "rows": 32, "accuracy": accuracy, "chance": 1 / 128,
                "ci95": [accuracy - 0.05, accuracy + 0.05], "questions": 256, "by_distance": bins}  # fmt: skip

    return {
        "id": f"{noise.random()}",
        "model": model,
        "varied": varied,
        "seed": seed,
        "parameters": 12_345,
        "state_bytes": STATE[model] + 512 * varied.get("eidetic_slots", 0),
        "train": {"tokens_per_second": 1234.5, "seconds": 10.0, "loss": [[10, 2.0]]},
        "facts_kept": [0.5, 0.25] if model == "bmojo" else None,
        "evaluations": [score(fields) for fields in asked],
    }


@pytest.fixture
def results():
    trials = []
    for seed in (0, 1, 2):
        for pairs in (8, 16):
            for rate in (1e-3, 3e-3):
                common = {"pairs": pairs, "learning_rate": rate}
                trials += [trial(model, seed, common, 0.1) for model in ("swa", "transformer")]
                for slots in (0, 16, 64):
                    for test in ("rls", "random"):
                        settings = {**common, "eidetic_slots": slots, "innovation": test}
                        trials.append(trial("bmojo", seed, settings, slots / 100 + rate * 10))
    trials.append({"model": "swa", "seed": 3, "varied": {"pairs": 8}, "failed": "the loss is nan at step 3"})
    return {
        "name": "made-up", "created": "2025-01-31T12:00:00+00:00", "command": "bmojo sweep mqar", "bmojo": "0.1.0",
        "machine": {"cpu": "Example", "threads": 1, "torch": "2.13.0", "device": "cpu"}, "task": "mqar", "size": "tiny",
        "fixed": {"length": 128}, "varied": ["pairs", "learning_rate", "eidetic_slots", "innovation"],
        "seeds": [0, 1, 2, 3], "notes": ["swa: smaller"], "planned": len(trials), "trials": trials,
    }  # fmt: skip


def test_a_figure_for_all_that_varies_or_is_asked(results, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "by_old.png").write_bytes(b"")
    write_report(tmp_path, results)
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {f"by_{name}" for name in ("state_bytes", "distance", "length_asked", "filler_asked", "pairs",
                                               "learning_rate", "eidetic_slots", "innovation")}  # fmt: skip
    for path in (tmp_path / "figures").iterdir():
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert width > 1000
        assert height > 500
        assert f"(figures/{path.name})" in (tmp_path / "table.md").read_text()


def test_what_is_asked_of_a_model_stays_with_it(results, tmp_path, monkeypatch):
    """Where a setting varies and is asked too, each value that was trained has a panel, with that value in it."""
    drawn, real = [], report.draw

    def spy(axis, preset, points, **changes):
        points = list(points)
        drawn.append((axis, [x for x, _ in points]))
        real(axis, preset, points, **changes)

    monkeypatch.setattr(report, "draw", spy)
    trials = [trial("bmojo", 0, {"length": length}, length=length) for length in (64, 128)]
    write_report(tmp_path, results | {"seeds": [0], "trials": trials, "varied": ["length"]})
    panels = [(axis.get_title(), xs) for axis, xs in drawn if axis.get_xlabel() == "length"]
    assert panels == [("length 64", [64, 256]), ("length 128", [128, 256]), ("", [64, 128])]


def test_the_table_shows_the_best_training_with_the_interval_of_its_seeds(results, tmp_path):
    write_report(tmp_path, results)
    text = (tmp_path / "table.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `bmojo, eidetic_slots=64, inn")]
    assert len(rows) == 4
    settings = {"pairs": 8, "eidetic_slots": 64, "innovation": "rls"}
    points = [settings | {"learning_rate": rate} for rate in (0.001, 0.003)]
    of = [[trial for trial in results["trials"] if trial["varied"] == point] for point in points]
    tried = [[t["evaluations"][0]["accuracy"] for t in trials] for trials in of]
    values = max(tried, key=sum)
    mean = sum(values) / 3
    half = 4.303 * (sum((v - mean) ** 2 for v in values) / 2 / 3) ** 0.5
    assert f"{mean:.3f} [{max(0, mean - half):.3f}, {min(1, mean + half):.3f}]" in rows[0][3]
    assert "0.50, 0.25" in rows[0]
    assert ("0.001", "0.003")[tried.index(values)] in rows[0]
    assert "- swa: smaller" in text
    assert "- swa, pairs=8, seed 3: the loss is nan at step 3" in text


def test_one_seed_has_the_interval_of_its_questions(results, tmp_path):
    results |= {"seeds": [0], "trials": [trial("swa", 0, {})], "varied": []}
    write_report(tmp_path, results)
    text = (tmp_path / "table.md").read_text()
    accuracy = results["trials"][0]["evaluations"][0]["accuracy"]
    assert f"{accuracy:.3f} [{accuracy - 0.05:.3f}, {accuracy + 0.05:.3f}]" in text
    assert "## All trials (chance 0.00781)" in text


def test_nothing_finished_is_no_error(results, tmp_path):
    results["trials"] = results["trials"][-1:]
    write_report(tmp_path, results)
    assert "## Failed" in (tmp_path / "table.md").read_text()
