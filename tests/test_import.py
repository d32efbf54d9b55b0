"""`import bmojo` is quick, and torch comes with the first thing that needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = """
import sys, time
start = time.perf_counter()
import bmojo
from bmojo import ModelConfig, presets
assert presets.bmojo("tiny").eidetic_slots
took = time.perf_counter() - start
assert took < 3, took
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert bmojo.__version__
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    run(LIGHT)


@pytest.mark.slow
def test_the_public_names_are_there():
    run("from bmojo import *; from bmojo import BMojoLM, presets; BMojoLM(presets.bmojo()); MemoryState, Mixer, Trace")


def test_an_unknown_name_is_an_attribute_error():
    import bmojo

    with pytest.raises(AttributeError, match="module 'bmojo' has no attribute 'nothing'"):
        bmojo.nothing  # noqa: B018
    assert set(bmojo.__all__) - {"__version__", "presets"} == set(bmojo._HOME)
