"""Storage in training: documents of a row never meet, nothing comes from the future, gradients are the definition's."""

import pytest
import torch
from cases import close, make_model, storage_configs
from hypothesis import given
from hypothesis import strategies as st
from literal import literal_model

from bmojo import BMojoLM
from bmojo.memory.storage import Storage


def drawn(data, rows: int, time: int) -> tuple[BMojoLM, torch.Tensor, torch.Generator]:
    config = data.draw(storage_configs())
    config = config.replace(storage_keys=config.storage_block)  # as in training blocks are found by all keys
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(rows, time, config.hidden_size, dtype=torch.float64, generator=generator)
    return make_model(config).train(), x, generator


@given(data=st.data())
def test_packed_documents_read_their_own_past_alone(data):
    model, x, _ = drawn(data, 2, 33)
    lengths = [data.draw(st.sampled_from([(33,), (1, 32), (14, 19), (9, 11, 13)])) for _ in range(2)]
    documents = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in lengths])
    with torch.no_grad():
        got = model(x, document_ids=documents, storage=Storage(model.config, 2, keep=False))[0]
        nothing = {layer: [] for layer in model.config.storage_layers}
        for row in range(2):
            expected = [literal_model(model, part.numpy(), nothing)[0] for part in x[row].split(lengths[row])]
            close(got[row], torch.cat([torch.from_numpy(part) for part in expected]), 1e-9)


@given(data=st.data())
def test_nothing_comes_from_the_future_by_way_of_other_rows(data):
    """Nor from where later padding and documents are."""
    model, x, generator = drawn(data, 3, 40)

    def layout() -> dict[str, torch.Tensor]:
        mask = torch.rand(3, 40, generator=generator) < data.draw(st.sampled_from([0.7, 1.1]))
        starts = torch.rand(3, 40, generator=generator) < data.draw(st.sampled_from([-1.0, 0.06]))
        return {"mask": mask, "document_ids": starts.cumsum(1)}

    cut, row, given_ = data.draw(st.integers(1, 39)), data.draw(st.integers(0, 2)), layout()
    other, changed = layout(), x.clone()
    changed[row, cut:] = torch.randn(x[row, cut:].shape, dtype=x.dtype, generator=generator)
    for name in given_:
        later = other[name][row, cut:] + (given_[name][row, cut - 1] if name == "document_ids" else 0)
        other[name] = given_[name].clone()
        other[name][row, cut:] = later
    with torch.no_grad():
        before, after = model(x, **given_)[0], model(changed, **other)[0]
    close(after[row, :cut], before[row, :cut], 1e-10)


@given(data=st.data())
def test_gradients_are_those_of_the_definition(data):
    """Along a random direction of all parameters, against finite differences."""
    model, x, generator = drawn(data, 1, 24)
    nothing = {layer: [] for layer in model.config.storage_layers}
    weights = torch.randn(24, model.config.vocab_size, dtype=x.dtype, generator=generator)
    logits = model(x, storage=Storage(model.config, keep=False))[0][0]
    used = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logits * weights).sum(), [*used.values()], allow_unused=True)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in used.values()]
    slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True) if g is not None)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, d in zip(used.values(), direction, strict=True):
                parameter += step * d
            values.append(float((torch.from_numpy(literal_model(model, x[0].numpy(), nothing)[0]) * weights).sum()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-4)
