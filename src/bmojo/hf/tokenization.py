"""The 256 bytes of UTF-8 as a Transformers tokenizer; the same ids as `bmojo.data.ByteTokenizer`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from bmojo.data.tokenizers import ByteTokenizer
from bmojo.errors import DataError

_BYTES = ByteTokenizer()
_TOKENS = [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in range(_BYTES.vocab_size)]  # no character twice
_IDS = {token: byte for byte, token in enumerate(_TOKENS)}


class BMojoByteTokenizer(PreTrainedTokenizer):
    """Token i is byte i: any text, no unknown tokens. Padding is byte 0, which no text needs; it has no other special
    tokens unless they are given: an ASCII character stands for its byte, any other token gets an id from 256 on (then
    `model.resize_token_embeddings(len(tokenizer))`). None is put into a text by itself.
    Batches are padded on the left, as generation needs."""

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, pad_token: str = "\x00", **kwargs: Any) -> None:
        super().__init__(pad_token=pad_token, **{"special_tokens_pattern": "none", **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer that `save_pretrained` wrote; the plain one for the folder of a model of bytes without any."""
        folder = Path(pretrained_model_name_or_path)
        if (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
            if size != _BYTES.vocab_size:
                raise DataError(
                    f"no tokenizer in {folder}, and its model's vocabulary of {size} is not that of bytes; "
                    "save the tokenizer that it was trained with there"
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        return _BYTES.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return _IDS | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [_TOKENS[byte] for byte in _BYTES.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return _IDS.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise DataError(f"byte ids must lie in 0..{self.vocab_size - 1}, got {index}")
        return _TOKENS[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        parts = (bytes([_IDS[token]]) if token in _IDS else token.encode() for token in tokens)
        return b"".join(parts).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()  # the bytes need no file
