import pytest
import torch
import torch.nn.functional as F
from cases import shaken

from bmojo import BMojoLM, Trace, presets
from bmojo.train import next_token_loss

TINY = {"hidden_size": 32, "num_heads": 2, "window": 16, "chunk_size": 16, "ssm_head_dim": 16, "eidetic_slots": 8}


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (3, 41), generator=draw)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].clone()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BMojoLM(presets.bmojo("tiny", **TINY, admission="innovation")).double()


def test_is_the_mean_over_labelled_positions(model, batch):
    batch["labels"][0, 5:] = -100
    logits, _ = model(batch["tokens"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(next_token_loss(model, batch), expected, rtol=1e-12, atol=0)


def test_ignored_labels_do_not_matter_and_none_gives_zero(model, batch):
    batch["labels"][:] = -100
    loss = next_token_loss(model, batch)
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_packed_documents_are_read_apart(model, batch):
    ids = torch.zeros_like(batch["tokens"])
    ids[:, 13:] = 1
    batch["labels"][:, 12] = -100
    parts = [{name: value[:, span] for name, value in batch.items()} for span in (slice(0, 13), slice(13, None))]
    losses = [next_token_loss(model, part) for part in parts]
    expected = (losses[0] * 12 + losses[1] * 27) / 39
    torch.testing.assert_close(next_token_loss(model, {**batch, "document_ids": ids}), expected, rtol=1e-10, atol=0)


def test_adds_the_auxiliary_loss_of_the_head(batch):
    found = []
    for weight in (0.5, 1.0):
        torch.manual_seed(0)
        changes = {"innovation": "head", "head_loss_weight": weight, "admission": "innovation"}
        model, trace = BMojoLM(presets.bmojo("tiny", **TINY, **changes)).double(), Trace()
        logits, _ = model(batch["tokens"], trace=trace)
        expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) + sum(
            loss.mean() for loss in trace.losses
        )
        assert len(trace.losses) == 2
        torch.testing.assert_close(next_token_loss(model, batch), expected, rtol=1e-12, atol=0)
        found.append(sum(loss.mean() for loss in trace.losses))
    torch.testing.assert_close(found[0], found[1] / 2, rtol=1e-12, atol=0)


def test_the_parts_of_a_batch_sum_to_the_whole(batch):
    """However the labels are spread: what processes that share a batch need."""
    model = shaken(BMojoLM(presets.bmojo("tiny", **TINY, innovation="head", head_loss_weight=0.5)))  # both losses
    batch["labels"][0, 1:] = -100
    batch["labels"][1] = -100
    predicted = (batch["labels"] != -100).sum()
    parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    total = sum(next_token_loss(model, part, predicted=predicted, share=1 / 3) for part in parts)
    torch.testing.assert_close(total, next_token_loss(model, batch), rtol=1e-12, atol=0)
