"""PEFT: LoRA on the projections of a bmojo model."""

import pytest
import torch
from cases import close, draw_tokens
from hf_cases import hf_model
from peft import LoraConfig, PeftModel, get_peft_model
from test_hf_training import Rows, losses, trainer
from transformers import AutoModelForCausalLM

# PEFT still asks for names that the newest Transformers wants replaced
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
ATTENTION, SSM = ["q_proj", "k_proj", "v_proj", "o_proj"], ["in_proj", "out_proj"]
CASES = [
    ("transformer", ATTENTION),
    ("mamba", ["in_proj", "x_proj", "dt_proj", "out_proj"]),
    ("mamba2", SSM),
    ("gdn", SSM),
    ("hybrid", ATTENTION + SSM),
]
CASES += [("bmojo", ATTENTION + SSM), ("bmojo", "all-linear")]


def adapted(name, targets, **changes):
    model = get_peft_model(
        hf_model(name, torch.float32, **changes),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False),
    )
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_lora(name, targets, tied, tmp_path):
    model = adapted(name, targets, tie_embeddings=tied)
    tokens = draw_tokens(2, 11)
    out = model(input_ids=tokens, labels=tokens)
    plain = hf_model(name, torch.float32, tie_embeddings=tied)
    assert not torch.allclose(out.logits, plain(tokens).logits, atol=1e-3)
    out.loss.backward()
    changed = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert changed == {key for key, _ in model.named_parameters() if "lora_" in key}
    for target in targets if isinstance(targets, list) else ():
        assert any(f".{target}.lora_A" in key for key in changed), target
    with torch.no_grad():
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        close(again(input_ids=tokens).logits, out.logits, 1e-6)
        options = {"max_new_tokens": 6, "do_sample": False}
        found = model.generate(input_ids=tokens, **options)
        merged = again.merge_and_unload()
        close(merged(tokens).logits, out.logits, 1e-4)
        assert torch.equal(merged.generate(tokens, **options), found)
        merged.save_pretrained(tmp_path / "merged")
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits, out.logits, 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_with_trained_embeddings(tied, tmp_path):
    base = hf_model("swa", torch.float32, tie_embeddings=tied)
    options = {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["embed"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**options)).eval()
    tokens = draw_tokens(2, 11)
    model(input_ids=tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
        expected = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path)
        plain = hf_model("swa", torch.float32, tie_embeddings=tied)
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-3)
        close(PeftModel.from_pretrained(plain, tmp_path).eval()(input_ids=tokens).logits, expected, 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_adapters_alone(checkpointing, tmp_path):
    model = adapted("bmojo", ATTENTION + SSM)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    if checkpointing:
        base = model.get_base_model()
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    run = trainer(model, tmp_path, Rows(8), max_steps=2)
    run.train()
    assert len(losses(run)) == 2
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) is ("lora_" not in key), key
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
