import pytest
import torch

from bmojo import BMojoLM, presets
from bmojo.nn.loss import NO_LABEL, answers

SMALL = {"vocab_size": 32, "hidden_size": 32, "num_heads": 2, "chunk_size": 8}
MEMORIES = {"window": 16, "ssm_head_dim": 16}
FAMILY = {
    "transformer": {},
    "mamba": {},
    "mamba2": {"ssm_head_dim": 16},
    "gdn": {"ssm_head_dim": 16},
    "bmojo": {**MEMORIES, "eidetic_slots": 4, "conv_size": 4},
}


@pytest.fixture(params=FAMILY)
def model(request):
    torch.manual_seed(0)
    return BMojoLM(presets.get(request.param, "tiny", **SMALL, **FAMILY[request.param])).double()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(32, (2, 3, 45), generator=draw)
    return {"tokens": tokens, "labels": labels.masked_fill(torch.rand(3, 45, generator=draw) < 0.7, NO_LABEL)}


def test_are_the_features_at_the_labels(model, batch):
    features, labels = answers(model, batch)
    asked = batch["labels"] != NO_LABEL
    assert torch.equal(features, model.features(batch["tokens"])[0][asked])
    assert torch.equal(labels, batch["labels"][asked])


@pytest.mark.parametrize("segment", [1, 10, 16, 100])
def test_reading_through_the_state_gives_the_same(model, batch, segment):
    expected, labels = answers(model, batch)
    features, same = answers(model, batch, segment=segment)
    assert torch.equal(same, labels)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-10)


def test_segments_keep_documents_apart(model, batch):
    ids = (torch.arange(45) >= 20).long().expand(3, -1)
    batch = {**batch, "document_ids": ids}
    torch.testing.assert_close(answers(model, batch, segment=13), answers(model, batch), rtol=1e-9, atol=1e-10)


def test_what_is_decoded_has_passed_through_the_last_token(model, batch):
    """Values and gradients are those of rows of one token each, read in an ordinary call."""
    decode = torch.arange(7).expand(3, -1)
    labels = batch["labels"][:, :7].clone()
    labels[0, 0] = NO_LABEL
    batch = {"tokens": batch["tokens"], "labels": labels, "decode": decode}
    features, found = answers(model, batch)
    assert torch.equal(found, labels[labels != NO_LABEL])

    last = model.features(batch["tokens"])[0][:, -1]
    codes = model.embed(decode) + last[:, None]
    expected, _ = model.features(codes.reshape(21, 1, 32))
    expected = expected.reshape(3, 7, 32)[labels != NO_LABEL]
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-10)
    weights = torch.randn(features.shape, dtype=features.dtype, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((value * weights).sum(), parameters, allow_unused=True) for value in (features, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(answers(model, batch, segment=10)[0], features, rtol=1e-9, atol=1e-10)
