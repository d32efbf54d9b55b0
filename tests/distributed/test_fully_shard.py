"""FSDP2, and DDP, on one process of a group of its own: the hooks of modules, without torchrun."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bmojo import BMojoLM, presets
from bmojo.ops import cross_entropy
from bmojo.train import next_token_loss

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window": 8, "chunk_size": 4,
         "ssm_head_dim": 8, "ssm_state_size": 4, "intermediate_size": 16, "eidetic_slots": 4}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Objective(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return next_token_loss(self.model, batch)


@pytest.fixture(params=[1, 6], ids=lambda chunks: f"{chunks} chunks of logits")
def chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * 32 * (40 // request.param))


@pytest.mark.usefixtures("chunks")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"innovation": "head"}], ids=str)
def test_shards_give_the_loss_and_the_gradients_of_the_whole(changes, checkpointing):
    """The embedding alone in its unit, as accelerate does: tied, it is read again as the head. A loss that a block
    notes must come out of it, though a sharded block sees copies of its arguments."""
    tokens = torch.randint(32, (2, 21), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    losses, gradients = [], []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = BMojoLM(presets.bmojo("tiny", **{**SMALL, **changes}))
        model.gradient_checkpointing = checkpointing
        objective = Objective(model)
        if sharded:
            for part in (*model.blocks, model.embed):
                fully_shard(part)
            fully_shard(objective)
        loss = objective(batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert torch.equal(*losses)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name].full_tensor(), gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_ready_once_a_step(tied):
    """DDP raises where one is used twice, or, at the next step, where one was not used."""
    torch.manual_seed(0)
    model = BMojoLM(presets.bmojo("tiny", **SMALL, tie_embeddings=tied, admission="innovation"))
    tokens = torch.randint(32, (2, 21), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    expected = torch.autograd.grad(next_token_loss(model, batch), list(model.parameters()))
    parallel = DistributedDataParallel(Objective(model))
    for _ in range(2):
        model.zero_grad()
        parallel(batch).backward()
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
