"""JSON files that follow a schema: checked, written and read, with errors in our words."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from bmojo.errors import CheckpointError, nearest
from bmojo.files import optional_module, write_whole


def check_schema(results: dict[str, Any], package: str) -> None:
    """Raise CheckpointError, naming the JSON path, unless `results` follow `package`'s schema/results.v1.json; numbers
    must be finite."""
    jsonschema = optional_module("jsonschema", "checking results")
    schema = json.loads(resources.files(package).joinpath("schema/results.v1.json").read_text("utf-8"))
    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine(
        "number", lambda checker, value: draft.TYPE_CHECKER.is_type(value, "number") and math.isfinite(value)
    )
    checked = jsonschema.validators.extend(draft, type_checker=types)(schema)
    error = jsonschema.exceptions.best_match(checked.iter_errors(results))
    if error is not None:
        raise broken(error.json_path, *_expected_and_got(error))


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON at `path`, unchecked."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a results.json, got {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got a file that is not: {error}") from error


def broken(path: str, expected: str, got: str) -> CheckpointError:
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
