"""Models with storage layers in Transformers' classes and DDP: they learn to read in training, and evaluate without."""

import pytest
import torch
from cases import close, draw_tokens
from hf_cases import hf_model, same_weights
from test_hf_training import Rows, losses, trainer
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from bmojo import BMojoForCausalLM
from bmojo.memory.storage import Storage

STORAGE = {"storage_layers": (0, 1), "storage_block": 4, "storage_stride": 2, "storage_keys": 2, "storage_queries": 2}


def test_it_trains_with_storage_and_evaluates_without(tmp_path):
    model = hf_model("bmojo", **STORAGE)
    tokens = draw_tokens(2, 40)
    core = model.model
    training = model.train()(tokens, labels=tokens, skip_logits=False)
    expected = core(tokens, storage=Storage(core.config, 2, distractors=True, keep=False))[0]
    assert torch.equal(training.logits, expected)
    base = core.with_settings(storage_layers=()).eval()
    assert (expected - base(tokens)[0]).abs().max() > 1e-4
    assert torch.equal(model.eval()(tokens).logits, base(tokens)[0])
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False)[:, :40], tokens)
    model.save_pretrained(tmp_path)
    again = BMojoForCausalLM.from_pretrained(tmp_path)
    assert again.model.config == core.config
    same_weights(again, model)


def test_trainer_and_gradient_checkpointing(tmp_path):
    runs = []
    for name in (False, True):
        model = hf_model("bmojo", torch.float32, **STORAGE)
        if name:
            model.model.gradient_checkpointing = True
        run = trainer(model, tmp_path / str(name), Rows(8, time=40))
        run.train()
        runs.append(losses(run))
    assert len(runs[0]) == 4
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_every_parameter_is_ready_once_a_step(tmp_path):
    model = hf_model("bmojo", admission="innovation", **STORAGE).model.train()
    tokens = draw_tokens(2, 40)
    expected = torch.autograd.grad(model(tokens)[0].square().mean(), list(model.parameters()))
    init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "ranks"), 1), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(tokens)[0].square().mean().backward()
    finally:
        destroy_process_group()
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        close(parameter.grad, gradient, 1e-10)
