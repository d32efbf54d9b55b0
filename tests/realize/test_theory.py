"""The statements of docs/theory.md that no other test shows, and that every test and figure it names is there."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from systems import stable

from bmojo.realize import LTI

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/theory.md").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"tests/[\w/]+\.py(?:::\w+)?", PAGE))))
def test_the_page_names_tests_that_are_there(path):
    file, _, name = path.partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^):#]+)\)", PAGE))))
def test_the_page_links_to_what_is_there(link):
    assert (ROOT / "docs" / link).exists()


@pytest.mark.parametrize("pole", [0.9, 0.5, -0.7])
def test_one_companion_block_holds_the_window_and_the_fading_state(pole):
    """The block of z^N (z - pole): a fixed readout is the last N inputs verbatim, its last coordinate fades."""
    N, T = 4, 60
    A = np.eye(N + 1, k=1)
    A[N, N] = pole
    B = np.eye(N + 1)[:, [N]]
    verbatim = np.eye(N, N + 1, k=1) - pole * np.eye(N, N + 1)
    m = LTI(A, B, np.concatenate((verbatim, np.eye(N + 1)[[N]])), np.zeros((N + 1, 1)))
    h = m.impulse(T)[1:, :, 0]
    np.testing.assert_allclose(h[:, :N], np.eye(T, N)[np.r_[N - 1 : -1 : -1, N:T]], atol=1e-12)
    np.testing.assert_allclose(h[:, N], pole ** np.arange(T), atol=1e-12)


def test_a_window_is_no_sum_of_fading_modes():
    """Its A is nilpotent: one eigenvector for N states, so it can't be made diagonal."""
    A = stable(0, 3, 1, 1).shift(6).A
    assert np.linalg.matrix_rank(A) == 5
    assert not np.linalg.matrix_power(A, 6).any()
