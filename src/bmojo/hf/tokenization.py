"""The 256 bytes of UTF-8 as a Transformers tokenizer; the same ids as `bmojo.data.ByteTokenizer`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer


class BMojoByteTokenizer(PreTrainedTokenizer):
    """Token i is byte i: any text, no unknown tokens. Padding is byte 0, which no text needs; it has no other special
    tokens unless they are given, as single bytes. Batches are padded on the left, as generation needs."""

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, pad_token: str = "\x00", **kwargs: Any) -> None:
        super().__init__(pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8")]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(token) for token in tokens).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()  # the bytes need no file
