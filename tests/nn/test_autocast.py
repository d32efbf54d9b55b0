"""Under autocast the states, scores and decay products stay what they are in float32."""

import pytest
import torch

from bmojo import BMojoLM, Trace, presets
from bmojo.ops.gated_delta import gated_delta_chunked
from bmojo.ops.s6 import s6, s6_chunked
from bmojo.ops.ssd import ssd_chunked


@pytest.mark.parametrize("tokens", [torch.full((1, 1024), 32), torch.randint(2, (2, 512))], ids=["spaces", "bits"])
def test_monotonous_tokens_are_scored(tokens):
    torch.manual_seed(0)
    model = BMojoLM(presets.bmojo("tiny", hidden_size=64))
    trace = Trace()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(tokens, trace=trace)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(score).all() and score.dtype == torch.float32 for score in trace.innovation)
    assert state.layers[0]["ssm"].dtype == state.layers[0]["rls_M"].dtype == torch.float32


def test_ops_are_not_rounded():
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 128, 2, 8), torch.randn(1, 128, 1, 4), torch.randn(1, 128, 1, 4)
    dt, A_log = torch.rand(1, 128, 2), torch.zeros(2)
    q, k = torch.nn.functional.normalize(torch.randn(2, 1, 128, 2, 4), dim=-1)
    flat = (x.flatten(2), torch.rand(1, 128, 16), torch.zeros(16, 4), B[:, :, 0], C[:, :, 0])
    calls = [
        lambda: s6(*flat, chunk_size=32),
        lambda: s6_chunked(*flat, chunk_size=32),
        lambda: ssd_chunked(x, dt, A_log, B, C, chunk_size=32),
        lambda: gated_delta_chunked(q, k, x, dt, -dt, chunk_size=32),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = call()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
