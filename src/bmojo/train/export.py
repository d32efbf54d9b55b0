"""A sharded checkpoint as a model folder. torch.distributed.checkpoint writes it, for `transformers.Trainer` with FSDP:

checkpoint-N/pytorch_model_fsdp_0/.metadata     which tensors there are, and where their pieces lie
                                  __0_0.distcp  the pieces that process 0 held, and so on
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bmojo.config import ModelConfig
from bmojo.errors import CheckpointError
from bmojo.nn.model import BMojoLM, require_weights

SHARDS = "pytorch_model_fsdp_0"


def export(
    checkpoint: str | os.PathLike, target: str | os.PathLike, *, config: str | os.PathLike | None = None
) -> BMojoLM:
    """Write the model of a sharded checkpoint to the new folder `target`, in one model.safetensors, and return it.

    `checkpoint` is a folder checkpoint-N of Trainer, or the one of the shards in it. The checkpoint has no
    configuration: that is `config` (a config.json or a folder with one), or a config.json in the checkpoint or in the
    folder that holds it. One process is enough, however many wrote. `target` opens with BMojoLM.load and, after
    `import bmojo`, AutoModelForCausalLM; it is left out if anything fails.
    Raises CheckpointError for a folder that is no sharded checkpoint, or is damaged; for weights that are missing, or
    not those of the configuration; and if `target` is there already. The index of a checkpoint is a pickle, which can
    hold any program: export only what you trust.
    """
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} is there already; choose a new folder")
    shards = _shards(Path(checkpoint))
    with torch.device("meta"):
        model = BMojoLM(_config(shards, None if config is None else Path(config)))
    model.load_state_dict(_read(shards, model), assign=True)
    try:
        model.save(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return model


def _shards(checkpoint: Path) -> Path:
    for folder in (checkpoint, checkpoint / SHARDS):
        if (folder / ".metadata").is_file():
            return folder
    if (checkpoint / "model.safetensors").is_file():
        raise CheckpointError(f"{checkpoint} is not sharded: its model.safetensors can be used as it is")
    raise CheckpointError(
        f"no sharded checkpoint at {checkpoint}: expected {SHARDS}/.metadata, which Trainer writes "
        "with FSDP and state_dict_type SHARDED_STATE_DICT"
    )


def _config(shards: Path, given: Path | None) -> ModelConfig:
    if given is not None:
        places = [given if given.is_file() else given / "config.json"]
    else:
        places = [folder / "config.json" for folder in (shards, shards.parent, shards.absolute().parents[1])]
    for path in places:
        if path.is_file():
            return ModelConfig.read(path)
    if given is not None:
        raise CheckpointError(f"no configuration at {places[0]}; name the config.json of the model")
    raise CheckpointError(f"no config.json beside {shards}; name that of the model with --config")


def _read(shards: Path, model: BMojoLM) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint that `model`, which has none, needs; all of them, and no others."""
    reader = dcp.FileSystemReader(shards)
    try:
        metadata = reader.read_metadata()
        stored = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        pieces = {info.relative_path for info in (metadata.storage_data or {}).values()}
    except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, ValueError, LookupError) as error:
        raise CheckpointError(f"{shards / '.metadata'} is damaged: {error}") from error
    if gone := sorted(piece for piece in pieces if not (shards / piece).is_file()):
        raise CheckpointError(f"{shards} is not whole: {', '.join(gone)} is missing; copy it from where it was written")
    own = {name: _own_name(name) for name in stored}
    shapes = {own[name]: tuple(entry.size) for name, entry in stored.items()}
    require_weights(model, shapes, f"the weights in {shards} do not belong to the configuration")
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise CheckpointError(f"{shards} is damaged ({reason}); export another checkpoint") from error
    return {own[name]: tensor for name, tensor in tensors.items()}


def _own_name(name: str) -> str:
    """The name in BMojoLM: without what Trainer, and the model that holds it, put before."""
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name
