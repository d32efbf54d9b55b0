"""Where checkpoints come from: a folder in the layout of Transformers, a .gguf file, or a name on the Hugging Face hub.

What is read first is config.json and the headers of the weights; a weight is read when it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bmojo.convert.mapping import ConversionError, Shape
from bmojo.errors import MissingPackageError
from bmojo.nn.model import shard_names

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# what lies beside the weights and is taken along as it is
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", GENERATION, "chat_template*")  # fmt: skip
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, read one by one."""

    def __init__(self, files: list[Path]) -> None:
        self.header: dict[str, tuple[Shape, Any]] = {}
        self._place = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118  (a safe_open has no __iter__)
                    part = file.get_slice(name)
                    self.header[name] = tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
                    self._place[name] = file
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{path} can't be read as safetensors: {error}; fetch it again") from error

    def __getitem__(self, name: str) -> Tensor:
        return self._place[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def locate(source: str | Path, work: Path) -> Path:
    """The folder of a source; what has to be fetched or unpacked for that goes to `work`."""
    path = Path(source)
    if path.suffix == ".gguf":
        return _unpack_gguf(path, work)
    if path.is_dir():
        inner = path / "model"  # of a run of `bmojo train`
        return inner if (inner / CONFIG).is_file() and not (path / CONFIG).is_file() else path
    if path.exists():
        raise ConversionError(f"{path} is a file; expected a model's folder, a .gguf file or a name on the hub")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _download(str(source))
    raise ConversionError(f"there is no {path}; expected a model's folder, a .gguf file or a name on the hub")


def read_settings(folder: Path) -> dict[str, Any]:
    """Its config.json."""
    if not (folder / CONFIG).is_file():
        raise ConversionError(f"{folder} is no model's folder: {CONFIG} is missing")
    return _read_object(folder / CONFIG)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} can't be read: {error}; fetch it again") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{path} must hold a JSON object, got {type(settings).__name__}")
    return settings


def _number(entry: dict[str, Any]) -> Any:
    """Transformers writes an infinite number as {"__float__": "Infinity"}."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def read_weights(folder: Path) -> Weights:
    """The headers of a folder's weights."""
    if (folder / WEIGHTS).is_file():
        return Weights([folder / WEIGHTS])
    index = folder / INDEX
    if not index.is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        how = "its weights are pickled; save them as safetensors first" if pickled else f"{WEIGHTS} is missing"
        raise ConversionError(f"{folder} can't be converted: {how}")
    try:
        files = [folder / name for name in shard_names(index)]
    except (OSError, ValueError) as error:
        raise ConversionError(f"{index} can't be read: {error!r}; fetch it again") from error
    for file in files:
        if not file.is_file():
            raise ConversionError(f"{file} is missing, which {INDEX} names; fetch it again")
    return Weights(files)


def companions(folder: Path) -> list[Path]:
    """The files that are taken along. The tokenizer of a run of `bmojo train` lies above its model."""
    found = sorted(path for pattern in COMPANIONS for path in folder.glob(pattern))
    above = folder.parent / "tokenizer.json"
    if folder.name == "model" and above.is_file() and not (folder / above.name).is_file():
        found.append(above)
    return found


def token_ids(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where text begins and ends: from generation_config.json, or else from config.json."""
    path = folder / GENERATION
    said = _read_object(path) if path.is_file() else settings
    return {name: said[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if said.get(name) is not None}


def _unpack_gguf(path: Path, work: Path) -> Path:
    """The model of a .gguf file, in float32, as a folder in `work`."""
    if not path.is_file():
        raise ConversionError(f"there is no {path}")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("reading a .gguf file needs the package gguf: pip install gguf") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # the readers below raise what they like
        raise ConversionError(f"{path} can't be read as a model: {' '.join(str(error).split())}") from error
    # not model.save_pretrained, which takes a model that was quantised in its file for one that still is
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    (work / CONFIG).write_text(json.dumps(settings))
    tied = {"lm_head.weight"} if settings.get("tie_word_embeddings") else set()
    save_file({name: tensor for name, tensor in model.state_dict().items() if name not in tied}, work / WEIGHTS)
    model.generation_config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    return work


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackageError(
            f"fetching {name} needs the package huggingface_hub: pip install 'bmojo[train]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, "*.safetensors", INDEX, *COMPANIONS]))
    except Exception as error:  # of the network, of the hub, of the disk
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(
            f"there is no folder {name}, and it can't be fetched from the hub ({reason}); give a local folder"
        ) from error
