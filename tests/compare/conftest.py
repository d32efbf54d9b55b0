"""A plausible results.json of both suites, made up: no model was trained for it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

PRESETS = ("transformer", "swa", "mamba2", "gdn", "hybrid", "bmojo_f", "bmojo")
WINDOW, TRAIN_LENGTH = 256, 1024
BITS = dict(zip(PRESETS, (1.612, 1.668, 1.655, 1.631, 1.604, 1.598, 1.589), strict=True))
SPEED = dict(zip(PRESETS, (9200.0, 9900.0, 8100.0, 7600.0, 8300.0, 5200.0, 3100.0), strict=True))
REACH = dict(zip(PRESETS, (0.55, 0.06, 0.25, 0.4, 0.35, 0.5, 0.75), strict=True))
TEXT = (
    "The lighthouse keeper wrote in his book every evening .\nOn the third of March he wrote : the key is 7 4 1 9 , "
    "and the lamp is out .\n\n\tNobody read it . Every evening the sea was grey , and every evening he wrote that "
    "the sea was grey . Then a ship came , and its captain asked for the key ; it was 7 4 1 9 ."
)


def _model(suite: str, preset: str) -> dict[str, Any]:
    noise = random.Random(f"{suite}/{preset}")
    i = PRESETS.index(preset)
    fixed = preset in ("swa", "mamba2", "gdn")
    floor = BITS[preset] * 2.1 if suite == "text" else 0.9 - REACH[preset]
    return {
        "name": f"{suite}/{preset}",
        "suite": suite,
        "preset": preset,
        "parameters": 6_012_000 + 9_731 * i,
        "tokens_trained": 12_288_000,
        "train": {
            "loss": [
                [step, floor + 5.2 * math.exp(-step / (180 + 12 * i)) + noise.uniform(-0.03, 0.03)]
                for step in range(0, 1501, 25)
            ],
            "tokens_per_second": SPEED[preset],
            "seconds": 12_288_000 / SPEED[preset],
            "peak_memory_bytes": 900_000_000 + 160_000_000 * i,
        },
        "eval": _text_eval(preset) if suite == "text" else _recall_eval(preset, noise),
        "decode": [
            {
                "context": context,
                "ms_per_token": 1.1 + 0.25 * i + (0.0 if fixed else context / (1500 if i == 0 else 9000)),
                "state_bytes": 400_000 + 30_000 * i + (0 if fixed else context * (2048 if i == 0 else 96)),
            }
            for context in (256, 1024, 4096, 16384)
        ],
    }


def _text_eval(preset: str) -> dict[str, Any]:
    bits = BITS[preset]
    drift = {"transformer": 0.12, "hybrid": 0.03}.get(preset, -0.01)
    return {
        "bits_per_byte": bits,
        "bits_per_byte_ci95": [bits - 0.011, bits + 0.011],
        "by_position": [
            [2.0**k, bits + 0.9 / (k + 1) + max(0, k - 10) * drift + (0.02 if preset == "swa" else 0.0) * max(0, k - 8)]
            for k in range(3, 13)
        ],
        "recall": [],
    }


def _recall_eval(preset: str, noise: random.Random) -> dict[str, Any]:
    recall = []
    for length in (512, 2048):
        for distance in (32, 128, 384, 1536):
            if distance >= length:
                continue
            where = "inside the window" if distance < WINDOW else "beyond the window"
            if length > TRAIN_LENGTH and distance >= WINDOW:
                where = "beyond the training length"
            far = 0.985 if distance < WINDOW else REACH[preset] * (1.0 if length == 512 else 0.8)
            accuracy = min(1.0, max(0.0, far + noise.uniform(-0.015, 0.015)))
            recall.append(
                {
                    "distance": distance,
                    "length": length,
                    "where": where,
                    "pairs": 16,
                    "accuracy": accuracy,
                    "chance": 1 / 16,
                }
            )
    return {"bits_per_byte": None, "bits_per_byte_ci95": None, "by_position": [], "recall": recall}


def _memory_sample() -> dict[str, Any]:
    noise = random.Random(0)
    words = TEXT.split(" ")
    text = [words[0], *(f" {word}" for word in words[1:])]
    layers = []
    for layer in (1, 3):
        innovation = [noise.lognormvariate(0.0, 0.6) + (1.5 if word.strip().isdigit() else 0.0) for word in text]
        kept = sorted(sorted(range(len(text)), key=lambda i, values=innovation: -values[i])[:12])
        layers.append({"layer": layer, "innovation": innovation, "kept": kept})
    return {"text": text, "layers": layers}


@pytest.fixture
def results() -> dict[str, Any]:
    models = [_model(suite, preset) for suite in ("text", "recall") for preset in PRESETS]
    models[PRESETS.index("bmojo")]["memory_sample"] = _memory_sample()
    return {
        "version": 1,
        "name": "synthetic",
        "created": "2025-01-31T12:00:00+00:00",
        "seed": 17,
        "profile": "small",
        "command": "bmojo compare --profile small --name synthetic",
        "bmojo": "0.1.0",
        "settings": {
            "train_length": TRAIN_LENGTH,
            "window": WINDOW,
            "target_parameters": 6_040_000,
            "parameter_tolerance": 0.02,
        },
        "corpus": {
            "name": "made-up stories",
            "bytes_train": 48_000_000,
            "bytes_eval": 1_200_000,
            "documents_train": 21_000,
            "documents_eval": 512,
            "sha256": "0123456789abcdef" * 4,
        },
        "machine": {"cpu": "Example CPU", "threads": 2, "torch": "2.13.0", "device": "cpu"},
        "models": models,
    }
