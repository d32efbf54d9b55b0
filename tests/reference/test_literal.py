"""The mixer equals its definition, written out query by query, over the whole space of options."""

from __future__ import annotations

import pytest
import torch
from cases import FAMILIES, close, configs, shaken
from hypothesis import given
from hypothesis import strategies as st
from literal import literal_mixer

from bmojo.nn.mixer import Mixer, Trace
from bmojo.ops.dispatch import use_backend


@pytest.mark.parametrize("backend", ["fused", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_mixer_equals_its_literal_definition(family, backend, data):
    config = data.draw(configs(family, layers=1))
    time = data.draw(st.integers(1, 26))
    mixer = shaken(Mixer(config), data.draw(st.integers(0, 99)))
    x = torch.randn(2, time, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(time))
    trace = Trace()
    with torch.no_grad(), use_backend(backend):
        got, _ = mixer(x, trace=trace)
    for row in range(2):
        expected = literal_mixer(mixer, x[row].numpy())
        if expected.scores is not None:
            kept = trace.kept[0][row]
            assert kept[kept >= 0].tolist() == expected.sets[-1]  # in the order of their rank
            close(trace.innovation[0][row], torch.from_numpy(expected.scores), 1e-7, "scores")
        close(got[row], torch.from_numpy(expected.output), message="output")
