"""Padding leaves no trace, and packed documents know nothing of each other; in one call and in many, and backwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    FAMILIES,
    VOCAB,
    any_config,
    close,
    configs,
    draw_tokens,
    make_model,
    partitions,
    run_calls,
    same_state,
    shaken,
    simplest,
    small_preset,
)
from hypothesis import given
from hypothesis import strategies as st

from bmojo.memory.state import MemoryState
from bmojo.nn.mixer import Mixer, Trace
from bmojo.nn.model import BMojoLM
from bmojo.presets import PRESETS


def placed(rows: list[torch.Tensor], style: str, time: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens among padding (random tokens) [B, time], and the mask that is True at the tokens."""
    tokens, mask = draw_tokens(len(rows), time, seed + 1), torch.zeros(len(rows), time, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for row, (tokens_row, mask_row) in zip(rows, zip(tokens, mask, strict=True), strict=True):
        start = {"left": time - len(row), "right": 0}.get(style)
        at = (
            torch.randperm(time, generator=generator)[: len(row)].sort().values
            if start is None
            else start + torch.arange(len(row))
        )
        tokens_row[at], mask_row[at] = row, True
    return tokens, mask


def check_padding(model: BMojoLM, lengths: list[int], style: str, cut: list[int], extra: int = 4) -> None:
    rows = [draw_tokens(1, length, i)[0] for i, length in enumerate(lengths)]
    tokens, mask = placed(rows, style, sum(cut), 3)
    more = draw_tokens(len(rows), extra + 1, 5)
    with torch.no_grad():
        logits, state, _ = run_calls(model, tokens, cut, mask=mask)
        continued, end, _ = run_calls(model, more, [extra, 1], state)  # without a mask: rows stand at different places
        for b, row in enumerate(rows):
            if len(row) == 0:
                start = model.empty_state(1)
            else:
                alone, start = model(row[None])
                close(logits[b][mask[b]], alone[0], message=f"row {b}")
                same_state(state.select([b]), start)
            expected, last = model(more[b : b + 1], start)
            close(continued[b : b + 1], expected, message=f"row {b}, continued")
            same_state(end.select([b]), last)


@pytest.mark.parametrize("style", ["left", "right", "inner"])
@given(data=st.data())
def test_padded_rows_equal_unpadded_rows(style, data):
    model = make_model(data.draw(any_config()))
    time = data.draw(st.integers(1, 19))
    lengths = data.draw(st.lists(st.integers(0, time), min_size=1, max_size=3))
    check_padding(model, lengths, style, data.draw(st.one_of(st.just([time]), partitions(time))))


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_that_end_on_different_whole_chunks_continue_without_a_mask(preset):
    model = make_model(small_preset(preset))
    check_padding(model, [4, 8, 12], "left", [12], extra=9)


def documents_of(tokens: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """The documents of one row."""
    starts = [0, *(torch.nonzero(ids[1:] != ids[:-1])[:, 0] + 1).tolist(), len(ids)]
    return [tokens[a:b] for a, b in itertools.pairwise(starts)]


@st.composite
def packs(draw: st.DrawFn) -> list[list[int]]:
    """Lengths of the documents of two rows of one length, and how the rows are cut into calls."""
    time = draw(st.integers(1, 22))
    return [draw(partitions(time)), draw(partitions(time)), draw(st.one_of(st.just([time]), partitions(time)))]


def ids_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.full((length,), (3 * i) % 7) for i, length in enumerate(lengths)])


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_packed_documents_equal_separate_ones(family, data):
    model = make_model(data.draw(configs(family)))
    *rows, cut = data.draw(packs())
    ids, tokens = torch.stack([ids_of(row) for row in rows]), draw_tokens(2, sum(cut))
    with torch.no_grad():
        logits, state, _ = run_calls(model, tokens, cut, document_ids=ids)
        for b in range(2):
            apart = [model(document[None]) for document in documents_of(tokens[b], ids[b])]
            close(logits[b], torch.cat([part[0] for part, _ in apart]), message=f"row {b}")
            same_state(state.select([b]), apart[-1][1], skip=("document",))
        assert state.document.tolist() == ids[:, -1].tolist()


@given(data=st.data())
def test_packed_and_padded_together(data):
    model = make_model(data.draw(any_config()))
    lengths, cut = data.draw(st.tuples(partitions(9), partitions(14)))
    row, ids = draw_tokens(1, 9)[0], ids_of(lengths)
    tokens, mask = placed([row], "inner", 14, 0)
    padded_ids = torch.full((1, 14), 5)
    padded_ids[mask] = ids
    with torch.no_grad():
        expected, end, _ = run_calls(model, row[None], [9], document_ids=ids[None])
        got, state, _ = run_calls(model, tokens, cut, mask=mask, document_ids=padded_ids)
    close(got[mask], expected[0])
    same_state(state, end)


@given(data=st.data())
def test_packed_documents_give_the_gradients_of_separate_ones(data):
    model = make_model(data.draw(any_config()))
    *rows, _ = data.draw(packs())
    ids, tokens = torch.stack([ids_of(row) for row in rows]), draw_tokens(2, sum(rows[0]))
    weight = torch.randn(*tokens.shape, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    (model(tokens, document_ids=ids)[0] * weight).sum().backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for b in range(2):
        apart = [model(document[None])[0][0] for document in documents_of(tokens[b], ids[b])]
        (torch.cat(apart) * weight[b]).sum().backward()
    for name, parameter in model.named_parameters():
        assert (packed[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            close(packed[name], parameter.grad, message=name)


def test_a_document_that_goes_on_over_calls_is_not_cut():
    model = make_model(small_preset("bmojo"))
    tokens = draw_tokens(1, 20)
    with torch.no_grad():
        expected, end = model(tokens)
        got, state, _ = run_calls(model, tokens, [7, 13], document_ids=torch.full((1, 20), 4))
    close(got, expected)
    same_state(state, end, skip=("document",))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["left", "right", "inner"])
def test_what_stands_at_padding_is_never_read(family, style):
    config = simplest(family)
    mixer = shaken(Mixer(config))
    x = torch.randn(2, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, {"left": slice(0, 3), "right": slice(8, 11), "inner": slice(4, 7)}[style]] = False
    with torch.no_grad():
        expected, end = mixer(x.masked_fill(~mask[..., None], 0), mask=mask)
        got, state = mixer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
    close(got, expected)
    for name in end:
        close(state[name], end[name], message=name)


def test_the_loss_of_the_head_does_not_see_padding():
    mixer = shaken(Mixer(simplest("head")), dtype=torch.float32)
    x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0))
    x[:, 6:] = 0
    mask = torch.arange(11).expand(2, -1) < 6
    short, padded = Trace(), Trace()
    mixer(x[:, :6], trace=short)
    mixer(x, mask=mask, trace=padded)
    assert padded.losses[0].isfinite().all()
    close(padded.losses[0], short.losses[0], 1e-5)
    padded.losses[0].sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in mixer.parameters())


@given(data=st.data())
def test_a_mask_without_padding_is_no_mask(data):
    model = make_model(data.draw(any_config()))
    tokens = draw_tokens(2, 9)
    with torch.no_grad():
        expected, end = model(tokens)
        got, state = model(tokens, model.empty_state(2), mask=torch.ones(2, 9, dtype=torch.int64))
    close(got, expected)
    same_state(state, end)
    assert isinstance(state, MemoryState)
