from __future__ import annotations

import copy
import json
import sys
from importlib import resources

import jsonschema
import pytest

from bmojo.compare.results import read_results, validate, write_results
from bmojo.errors import CheckpointError, MissingPackageError

TEXT_BMOJO, RECALL = 6, 7  # indices into the fixture's models


def test_the_schema_is_valid_and_describes_every_field():
    schema = json.loads(resources.files("bmojo.compare").joinpath("schema/results.v1.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)

    def fields(part, path):
        if not isinstance(part, dict):
            return
        for name, field in part.get("properties", {}).items():
            yield f"{path}.{name}", field
            yield from fields(field, f"{path}.{name}")
        yield from fields(part.get("items"), f"{path}[]")
        for name, definition in part.get("$defs", {}).items():
            yield from fields(definition, name)

    found = dict(fields(schema, "$"))
    assert len(found) > 50
    assert [path for path, field in found.items() if "description" not in field] == []


def test_the_schema_accepts_both_suites_and_each_alone(results):
    validate(results)
    for suite in ("text", "recall"):
        alone = copy.deepcopy(results)
        alone["models"] = [model for model in alone["models"] if model["suite"] == suite]
        alone["corpus"] = alone["corpus"] if suite == "text" else None
        validate(alone)


def test_optional_fields_may_be_absent(results):
    for key in ("command", "settings", "bmojo"):
        del results[key]
    del results["models"][TEXT_BMOJO]["memory_sample"]
    results["models"][0]["configuration"] = {"layers": 4}
    validate(results)


BREAKS = [
    (("version",), 2, r"at \$\.version: expected const 1, got 2"),
    (("created",), "yesterday", r"\$\.created: expected pattern .*'yesterday'"),
    (("seed",), "17", r"\$\.seed: expected integer, got '17'"),
    (("sede",), 17, r"\$: expected known keys only, got 'sede'; did you mean 'seed'\?"),
    (("corpus", "bytes_eval"), -1, r"\$\.corpus\.bytes_eval: expected minimum 0, got -1"),
    (("corpus", "sha256"), "xyz", r"\$\.corpus\.sha256"),
    (("machine", "threads"), 0, r"\$\.machine\.threads: expected minimum 1"),
    (("settings", "window"), "wide", r"\$\.settings\.window: expected integer"),
    (("models", 0, "suite"), "speech", r"\$\.models\[0\]\.suite: expected enum .*'speech'"),
    (("models", 0, "train", "loss", 1), [25], r"\$\.models\[0\]\.train\.loss\[1\]: expected minItems 2"),
    (("models", 0, "train", "loss", 1), [25, float("nan")], r"loss\[1\]\[1\]: expected number, got nan"),
    (("models", 0, "train", "seconds"), float("inf"), r"\.seconds: expected number, got inf"),
    (("models", 0, "eval", "bits_per_byte"), None, r"models\[0\]\.eval\.bits_per_byte: expected number, got None"),
    (("models", 0, "eval", "bits_per_byte_ci95"), [2.0, 3.0], r"bits_per_byte_ci95: expected low <= bits_per_byte"),
    (("models", 0, "eval", "by_position", 0), [0, 2.0], r"by_position\[0\]\[0\]: expected exclusiveMinimum 0"),
    (("models", 0, "decode", 0, "ms_per_token"), 0, r"decode\[0\]\.ms_per_token: expected exclusiveMinimum 0"),
    (("models", RECALL, "eval", "bits_per_byte"), 1.0, r"models\[7\]\.eval\.bits_per_byte: expected null, got 1\.0"),
    (("models", RECALL, "eval", "by_position"), [[1, 1.0]], r"models\[7\]\.eval\.by_position: expected maxItems 0"),
    (("models", RECALL, "eval", "recall", 0, "accuracy"), 1.5, r"recall\[0\]\.accuracy: expected maximum 1"),
    (("models", RECALL, "eval", "recall", 0, "where"), "far", r"recall\[0\]\.where: expected enum"),
    (
        ("models", RECALL, "memory_sample"),
        {"text": [], "layers": []},
        r"models\[7\]\.memory_sample: expected no such key in this suite",
    ),
    (
        ("models", TEXT_BMOJO, "memory_sample", "layers", 1, "innovation"),
        [0.5],
        r"layers\[1\]\.innovation: expected \d+ numbers, one per token, got 1",
    ),
    (
        ("models", TEXT_BMOJO, "memory_sample", "layers", 0, "kept"),
        [3, 999],
        r"layers\[0\]\.kept: expected indices below \d+, the number of tokens, got 999",
    ),
    (("models", 1, "preset"), "transformer", r"\$\.models\[1\]: expected one model per suite and preset"),
]


@pytest.mark.parametrize(("path", "value", "message"), BREAKS, ids=[str(path[-1]) for path, _, _ in BREAKS])
def test_a_break_is_refused_with_its_path_in_one_line(results, path, value, message):
    place = results
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        validate(results)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(results):
    del results["models"][3]["train"]["seconds"]
    with pytest.raises(CheckpointError, match=r"\$\.models\[3\]\.train: expected the keys seconds, got none"):
        validate(results)


def test_round_trip(tmp_path, results):
    path = tmp_path / "runs" / "results.json"
    write_results(path, results)
    assert read_results(path) == results
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_refused_results_leave_the_old_file(tmp_path, results):
    path = tmp_path / "results.json"
    write_results(path, results)
    with pytest.raises(CheckpointError):
        write_results(path, {**results, "version": 2})
    assert read_results(path) == results


@pytest.mark.parametrize("content", [None, "{", json.dumps({"version": 1})])
def test_an_unreadable_file_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match="expected"):
        read_results(path)


def test_a_missing_package_names_its_extra(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(
        MissingPackageError, match=r"checking results needs the package jsonschema: pip install 'bmojo\[train\]'"
    ):
        validate(results)
