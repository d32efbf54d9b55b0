"""results.json of `bmojo compare`: checked, written and read. `schema/results.v1.json` documents every field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmojo.schema import broken, check_schema, read_json, write_json


def validate(results: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the JSON path, unless `results` follow version 1 of the format."""
    check_schema(results, "bmojo.compare")
    _check_relations(results)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Validate `results` and write them to `path`, whole or not at all."""
    validate(results)
    write_json(path, results)


def read_results(path: Path) -> dict[str, Any]:
    """The valid results at `path`."""
    results = read_json(path)
    validate(results)
    return results


def _check_relations(results: dict[str, Any]) -> None:
    """What a schema can't say: unique models, ordered intervals, samples with one innovation per token."""
    seen = set()
    for i, model in enumerate(results["models"]):
        path = f"$.models[{i}]"
        key = (model["suite"], model["preset"])
        if key in seen:
            raise broken(path, "one model per suite and preset", f"a second {key[0]}/{key[1]}")
        seen.add(key)
        interval = model["eval"]["bits_per_byte_ci95"]
        if interval and not interval[0] <= model["eval"]["bits_per_byte"] <= interval[1]:
            raise broken(f"{path}.eval.bits_per_byte_ci95", "low <= bits_per_byte <= high", str(interval))
        sample = model.get("memory_sample", {"text": [], "layers": []})
        tokens = len(sample["text"])
        for j, layer in enumerate(sample["layers"]):
            at = f"{path}.memory_sample.layers[{j}]"
            if len(layer["innovation"]) != tokens:
                raise broken(f"{at}.innovation", f"{tokens} numbers, one per token", str(len(layer["innovation"])))
            if outside := [index for index in layer["kept"] if index >= tokens]:
                raise broken(f"{at}.kept", f"indices below {tokens}, the number of tokens", str(outside[0]))
