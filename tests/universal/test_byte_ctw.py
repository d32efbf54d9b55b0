import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo.errors import DataError
from bmojo.universal.arithmetic import BITS
from bmojo.universal.byte_ctw import ByteCTW


def definition(data, depth, prior=0.5):
    """-log2 P: of every tree of decisions, the block probability by recursion over the contexts seen."""
    past, trees = bytes(depth), {}
    padded = past + data
    for i, byte in enumerate(data):
        context = padded[i : i + depth][::-1]  # the last byte first
        for place in range(7, -1, -1):
            trees.setdefault((1 << 8 | byte) >> (place + 1), []).append((context, byte >> place & 1))

    def log_kt(bits):
        counts, total = [prior, prior], 0.0
        for bit in bits:
            total += math.log2(counts[bit] / sum(counts))
            counts[bit] += 1
        return total

    def weighted(seen, level):
        own = log_kt([bit for _, bit in seen])
        if level == depth:
            return own
        children = {}
        for context, bit in seen:
            children.setdefault(context[level], []).append((context, bit))
        below = sum(weighted(part, level + 1) for part in children.values())
        return np.logaddexp2(own, below) - 1

    return -sum(weighted(seen, 0) for seen in trees.values())


text = st.one_of(st.binary(max_size=80), st.text("ab", max_size=200).map(str.encode))


@given(text, st.integers(0, 6), st.sampled_from([0.5, 0.1]))
def test_code_length_is_that_of_the_definition(data, depth, prior):
    model = ByteCTW(depth, prior)
    code = model.encode(data)
    ideal = definition(data, depth, prior)
    quantisation = 8 * len(data) * 3 * 2.0**-BITS
    assert 8 * len(code) <= ideal * (1 + 1e-6) + 2 + 8 + quantisation  # float32 ratios; 2 for the coder; whole bytes
    assert 8 * len(code) >= ideal * (1 - 1e-6) - 16 - 8  # zeros at the end are left out
    assert model.decode(code, len(data)) == data


def test_progress_and_pieces():
    data, told = bytes(range(256)) * 600, []
    code = ByteCTW(1).encode(data, told.append)
    assert told == [65536, 131072, len(data)]
    assert ByteCTW(1).decode(code, len(data)) == data
    assert len(code) < len(data) / 50


def test_crowded_tables_and_full_counts_decode(monkeypatch):
    monkeypatch.setattr("bmojo.universal.byte_ctw._SIZES", (1009,))
    random = np.random.default_rng(0)
    data = random.integers(0, 256, 20_000, dtype=np.uint8).tobytes() + bytes(150_000)
    code = ByteCTW(3).encode(data)
    assert ByteCTW(3).decode(code, len(data)) == data


@pytest.mark.parametrize(("settings", "said"), [({"depth": 7}, "0 to 6.*7"), ({"prior": 0}, r"\(0, 1\].*0")])
def test_settings_out_of_range(settings, said):
    with pytest.raises(DataError, match=said):
        ByteCTW(**settings)


def test_without_numba_the_same_code(tmp_path):
    """In a process that has no numba: the same codes and predictions, and a warning."""
    data = b"the cat sat on the mat, the cat sat on the hat. " * 4
    script = f"""
import importlib.util, sys
sys.modules["numba"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import warnings; warnings.simplefilter("ignore")
import numpy as np
from bmojo.universal.arithmetic import Decoder, Encoder, quantise
from bmojo.universal.byte_ctw import ByteCTW
from bmojo.universal.compiled import HAS_NUMBA
assert not HAS_NUMBA
code = ByteCTW(3).encode({data!r})
assert ByteCTW(3).decode(code, {len(data)}) == {data!r}
f = quantise(np.random.default_rng(0).dirichlet(np.ones(300), 50))
e = Encoder(); e.put(f, np.arange(50)); c = e.finish()
assert (Decoder(c).take(f) == np.arange(50)).all()
print(code.hex())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ByteCTW(3).encode(data).hex()
