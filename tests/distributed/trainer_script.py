"""A user's own script: transformers.Trainer on BMojoForCausalLM; `trainer_script.py RUNS.json RESULTS.json`.

RUNS maps names to arguments of `run`. Runs with FSDP go last: accelerate keeps it on for the rest of the process.
"""

import json
import os
import sys
import warnings

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from bmojo import BMojoConfig, BMojoForCausalLM, presets

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window": 8, "chunk_size": 4,
         "ssm_head_dim": 8, "ssm_state_size": 4, "intermediate_size": 16, "eidetic_slots": 4,
         "innovation_dim": 4}  # fmt: skip
BATCH = 4
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"], "state_dict_type": "SHARDED_STATE_DICT"}


class Rows(Dataset):
    """Random tokens, padded to 24, with another number of labels in every row."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = torch.randint(32, (24,), generator=torch.Generator().manual_seed(i))
        mask = torch.arange(24) < 9 + i % 16
        labels = torch.where(mask, tokens, -100)
        labels[: i % 5] = -100
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def use_fsdp_on_cpu():
    """accelerate 1.15 takes FSDP for what GPUs do, and trains with DDP on CPUs without a word."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def run(folder, *, fsdp=False, resume=None, checkpointing=False, accumulate=1, **changes):
    """Losses of 4 steps, by step; checkpoints after 2 and 4."""
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig.from_core(presets.bmojo("tiny", **{**SMALL, **changes})))
    sharded = {"activation_checkpointing": checkpointing}
    args = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=BATCH // accumulate // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        log_level="error",
        **({"fsdp": True, "fsdp_config": {**FSDP, **sharded}} if fsdp else sharded),
    )
    trainer = Trainer(model=model, args=args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_fsdp_enabled == fsdp
    return {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    use_fsdp_on_cpu()
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    results = {name: run(**arguments) for name, arguments in runs.items()}
    if os.environ["RANK"] == "0":
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)
