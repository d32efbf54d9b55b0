"""Training by Transformers: Trainer, gradient checkpointing, accumulation, embeddings of another size, LoRA."""

import copy
import warnings

import pytest
import torch
from cases import close, draw_tokens
from hf_cases import PRESETS, hf_model, same_weights
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from bmojo import BMojoForCausalLM, Trace
from bmojo.errors import ConfigError
from bmojo.ops import cross_entropy


class Rows(Dataset):
    """Row i is always the same; `ignored`: -100 in some labels, more of them in later rows."""

    def __init__(self, count, time=12, ignored=True):
        self.count, self.time, self.ignored = count, time, ignored

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        tokens = draw_tokens(1, self.time, seed=i)[0]
        labels = tokens.clone()
        labels[0] = -100  # nothing predicts it, but Trainer of older versions counts it
        labels[1 : 1 + i % 4 * self.ignored] = -100
        return {"input_ids": tokens, "labels": labels}


def trainer(model, folder, rows, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, **options},
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        return Trainer(model=model, args=args, train_dataset=rows)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["bmojo", "hybrid"])
def test_trainer_saves_and_goes_on_with_equal_losses(name, tmp_path):
    whole = trainer(hf_model(name, torch.float32), tmp_path / "whole", Rows(8))
    whole.train()
    assert len(losses(whole)) == 4
    first = trainer(hf_model(name, torch.float32), tmp_path / "parts", Rows(8))
    first.train()
    resumed = trainer(hf_model(name, torch.float32), tmp_path / "parts", Rows(8))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    same_weights(resumed.model, whole.model)
    whole.save_model(tmp_path / "saved")
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), whole.model)
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4"), whole.model)


# an auxiliary loss is a mean over tokens: its weight in a batch is that of the labels, where rows have equally many
@pytest.mark.parametrize(("name", "changes"), [("bmojo_f", {}), ("bmojo", {"innovation": "head"})])
def test_gradient_accumulation_equals_one_large_batch(name, changes, tmp_path):
    rows = Rows(4, ignored=not changes)
    large = trainer(hf_model(name, **changes), tmp_path, rows, per_device_train_batch_size=4, max_steps=1)
    large.train()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    small = trainer(hf_model(name, **changes), tmp_path, rows, **options)
    small.train()
    assert losses(small)[0] == pytest.approx(losses(large)[0], rel=1e-6)
    for (key, a), b in zip(small.model.named_parameters(), large.model.parameters(), strict=True):
        close(a, b, 1e-7, key)


def test_trainer_on_packed_rows(tmp_path):
    run = trainer(hf_model("bmojo", torch.float32), tmp_path, Rows(8))
    run.data_collator = DataCollatorWithFlattening()
    run.train()
    assert len(losses(run)) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_training_needs_no_logits_unless_they_are_wanted(tied, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * 13 * 8)
    model, tokens = hf_model("bmojo", tie_embeddings=tied).train(), draw_tokens(3, 11)
    labels = tokens.masked_fill(tokens == 3, -100)
    out = {}
    for skip in (None, False, True):
        model.zero_grad()
        out[skip] = model(tokens, labels=labels, skip_logits=skip)
        out[skip].loss.backward()
        out[skip].gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert out[None].logits is out[True].logits is None
    close(out[False].logits, model(tokens).logits)
    for skip in (None, True):
        close(out[skip].loss, out[False].loss)
        torch.testing.assert_close(out[skip].gradients, out[False].gradients, rtol=1e-9, atol=1e-11)
    model.skip_logits = False
    assert model(tokens, labels=labels).logits is not None
    model.skip_logits = True
    assert model(tokens).logits is not None
    evaluated = model.eval()(tokens, labels=labels)
    assert evaluated.logits is not None
    close(evaluated.loss, model(tokens, labels=labels, skip_logits=True).loss)


def test_trainer_evaluates(tmp_path):
    model = hf_model("bmojo")
    run = trainer(model, tmp_path, Rows(2), per_device_eval_batch_size=2)
    batch = Rows(2)
    tokens, labels = (torch.stack([batch[i][key] for i in range(2)]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        expected = model(tokens, labels=labels).loss
    assert run.evaluate(batch)["eval_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert run.predict(batch).predictions.shape == (2, 12, 13)


CHECKPOINTED = [*((name, {}) for name in PRESETS), *(("bmojo", {"innovation": kind}) for kind in ("head", "state"))]


def gradients(model, tokens):
    model.zero_grad()
    trace = Trace()
    model.model(tokens, trace=trace)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, trace


def enable(model, options=None, **kwargs):
    """The name of newer versions of Transformers, else the one that all have."""
    new = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    return new(options, **kwargs)


@pytest.mark.parametrize(("name", "changes"), CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(name, changes):
    model = hf_model(name, **changes).train()
    tokens = draw_tokens(2, 19)
    loss, expected, trace = gradients(model, tokens)
    enable(model)
    assert model.model.gradient_checkpointing
    again, found, noted = gradients(model, tokens)
    assert torch.equal(again, loss)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        close(found[key], gradient, 1e-12, key)
    for ours, theirs in ((noted.kept, trace.kept), (noted.innovation, trace.innovation), (noted.losses, trace.losses)):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradient_checkpointing_runs_each_block_again():
    model = hf_model("bmojo").train()
    calls = []
    model.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    enable(model, {"preserve_rng_state": False})
    model(draw_tokens(2, 9), labels=draw_tokens(2, 9)).loss.backward()
    assert len(calls) == 2
    assert copy.deepcopy(model).model.gradient_checkpointing
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert not model.model.gradient_checkpointing
    model(draw_tokens(2, 9), labels=draw_tokens(2, 9)).loss.backward()
    assert len(calls) == 3


def test_options_of_gradient_checkpointing_that_are_refused():
    model = hf_model("bmojo")
    with pytest.raises(ConfigError, match="use_reentrant must be False: the reentrant form loses gradients"):
        enable(model, {"use_reentrant": True})
    with pytest.raises(ConfigError, match="every_n_layers must be 1, got 2"):
        model._set_gradient_checkpointing(every_n_layers=2)
    assert not model.model.gradient_checkpointing


def test_trainer_with_gradient_checkpointing(tmp_path):
    plain = trainer(hf_model("bmojo", torch.float32), tmp_path / "plain", Rows(8), max_steps=2)
    plain.train()
    model = hf_model("bmojo", torch.float32)
    enable(model)
    saving = trainer(model, tmp_path / "saving", Rows(8), max_steps=2)
    saving.train()
    assert losses(saving) == losses(plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [17, 9])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_embeddings_of_another_size(tied, size, mean_resizing, tmp_path):
    model = hf_model("bmojo", torch.float32, tie_embeddings=tied)
    tokens = draw_tokens(2, 11) % 9
    with torch.no_grad():
        before = model(tokens).logits
    assert model.resize_token_embeddings(size, mean_resizing=mean_resizing) is model.get_input_embeddings()
    assert model.config.vocab_size == model.model.config.vocab_size == size
    kept = min(size, 13)
    after = model(tokens).logits
    assert after.shape == (2, 11, size)
    close(after[..., :kept], before[..., :kept], 1e-5)
    assert (model.get_output_embeddings() is None) is tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_weights(again, model)
    found = again.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, model.generate(tokens, max_new_tokens=5, do_sample=False))
    model(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*")
def test_new_rows_are_drawn_like_the_others(tied):
    model = BMojoForCausalLM(hf_model("swa", hidden_size=64, num_heads=2, tie_embeddings=tied).config)
    model.resize_token_embeddings(400, mean_resizing=False)
    for table in (model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])):
        assert float(table.weight[13:].detach().std()) == pytest.approx(64**-0.5, rel=0.05)
    assert hf_model("swa", initializer_range=0.5)._init_weights(plain := torch.nn.Linear(100, 100, bias=False)) is None
    assert float(plain.weight.detach().std()) == pytest.approx(0.5, rel=0.05)


def test_smoothed_labels_are_shifted_as_all_others(tmp_path):
    """Trainer then takes the loss itself, and shifts labels for the models alone that it finds in a list."""
    losses = []
    for smoothing in (0.0, 1e-9):
        run = trainer(hf_model("bmojo", torch.float32), tmp_path / str(smoothing), Rows(4, ignored=False),
                      label_smoothing_factor=smoothing)  # fmt: skip
        losses.append(run.evaluate(Rows(4, ignored=False))["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
