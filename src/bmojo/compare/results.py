"""results.json of `bmojo compare`: checked, written and read. `schema/results.v1.json` documents every field."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from bmojo.errors import CheckpointError, nearest
from bmojo.files import optional_module, write_whole


def validate(results: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the JSON path, unless `results` follow version 1 of the format."""
    jsonschema = optional_module("jsonschema", "checking results")
    schema = json.loads(resources.files("bmojo.compare").joinpath("schema/results.v1.json").read_text("utf-8"))
    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine(
        "number", lambda checker, value: draft.TYPE_CHECKER.is_type(value, "number") and math.isfinite(value)
    )
    checked = jsonschema.validators.extend(draft, type_checker=types)(schema)
    error = jsonschema.exceptions.best_match(checked.iter_errors(results))
    if error is not None:
        raise _broken(error.json_path, *_expected_and_got(error))
    _check_relations(results)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Validate `results` and write them to `path`, whole or not at all."""
    validate(results)
    write_whole(path, (json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_results(path: Path) -> dict[str, Any]:
    """The valid results at `path`."""
    try:
        results = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a results.json, got {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got a file that is not: {error}") from error
    validate(results)
    return results


def _broken(path: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(f"results at {path}: expected {expected}, got {got}")


def _expected_and_got(error: Any) -> tuple[str, str]:
    """A schema error in our words."""
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"the keys {', '.join(missing)}", "none"
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = next(key for key in error.instance if key not in known)
        return "known keys only", f"{unknown!r}; {nearest(unknown, known)}"
    if error.validator == "not":
        return "no such key in this suite", _short(error.instance)
    if error.validator == "type":
        types = error.validator_value
        return types if isinstance(types, str) else " or ".join(types), _short(error.instance)
    return f"{error.validator} {error.validator_value}", _short(error.instance)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_relations(results: dict[str, Any]) -> None:
    """What a schema can't say: unique models, ordered intervals, samples with one innovation per token."""
    seen = set()
    for i, model in enumerate(results["models"]):
        path = f"$.models[{i}]"
        key = (model["suite"], model["preset"])
        if key in seen:
            raise _broken(path, "one model per suite and preset", f"a second {key[0]}/{key[1]}")
        seen.add(key)
        interval = model["eval"]["bits_per_byte_ci95"]
        if interval and not interval[0] <= model["eval"]["bits_per_byte"] <= interval[1]:
            raise _broken(f"{path}.eval.bits_per_byte_ci95", "low <= bits_per_byte <= high", str(interval))
        sample = model.get("memory_sample", {"text": [], "layers": []})
        tokens = len(sample["text"])
        for j, layer in enumerate(sample["layers"]):
            at = f"{path}.memory_sample.layers[{j}]"
            if len(layer["innovation"]) != tokens:
                raise _broken(f"{at}.innovation", f"{tokens} numbers, one per token", str(len(layer["innovation"])))
            if outside := [index for index in layer["kept"] if index >= tokens]:
                raise _broken(f"{at}.kept", f"indices below {tokens}, the number of tokens", str(outside[0]))
