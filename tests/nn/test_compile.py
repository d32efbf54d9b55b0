"""Compiled equals eager, as one graph where nothing depends on the data. All of the compiler but its code generator,
which takes half a minute a model."""

from __future__ import annotations

import pytest
import torch
from cases import close, draw_tokens, make_model, same_state, small_preset

from bmojo.nn.loss import auxiliary_loss
from bmojo.nn.mixer import Trace
from bmojo.presets import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the compiler itself


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        *((name, {}) for name in PRESETS),
        ("bmojo", {"admission": "learned"}),
        ("bmojo", {"ssm": "s6", "innovation": "state"}),
        ("bmojo", {"storage_layers": (0, 1), "storage_block": 4, "storage_stride": 2, "storage_queries": 2}),
    ],
)
def test_a_training_step_is_one_graph(preset, changes):
    model = make_model(small_preset(preset, **changes))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens, gradients = draw_tokens(2, 19), []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        trace = Trace()
        logits, state = run(tokens, trace=trace)
        (logits.square().sum() + auxiliary_loss(trace)).backward()
        gradients.append((logits, state, {name: p.grad for name, p in model.named_parameters()}))
    (expected, end, ours), (got, state, theirs) = gradients
    close(got, expected)
    same_state(state, end)
    for name, gradient in ours.items():
        close(theirs[name], gradient, message=name)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "transformer"])  # its cache grows
def test_decoding_a_token_is_one_graph(preset):
    model = make_model(small_preset(preset))
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        _, state = model(draw_tokens(2, 5))
        other = state
        for t in range(9):
            token = draw_tokens(2, 1, t)
            expected, state = model(token, state)
            got, other = step(token, other)
            close(got, expected)
        same_state(other, state)


@pytest.mark.parametrize("preset", ["transformer", "bmojo"])
def test_calls_padding_and_documents_are_right_in_several_graphs(preset):
    model = make_model(small_preset(preset, num_layers=1))
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    tokens = draw_tokens(2, 19)
    mask = torch.arange(19) >= torch.tensor([[0], [6]])
    ids = (torch.arange(19) // 7).expand(2, -1)
    with torch.no_grad():
        expected, state = model(tokens, mask=mask, document_ids=ids)
        got, other = compiled(tokens, mask=mask, document_ids=ids)
        close(got, expected)
        close(compiled(tokens, other)[0], model(tokens, state)[0])
