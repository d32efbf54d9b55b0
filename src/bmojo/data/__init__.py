"""Text to training rows: documents, tokenizers, a memory-mapped token store and packing. Needs numpy only.

data = prepare("stdlib", load_tokenizer("bytes"), "store")
row = PackedRows(data.train, seq_len=512, seed=0)[0]
"""

from bmojo.data.documents import Document, read_documents
from bmojo.data.packing import IGNORED_LABEL, PackedRows, single_document_windows
from bmojo.data.store import TextData, TokenStore, prepare, reopen, require_length
from bmojo.data.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    Held,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    save_for_transformers,
    token_dtype,
    train_bpe,
)

__all__ = [
    "IGNORED_LABEL",
    "ByteTokenizer",
    "Document",
    "FileTokenizer",
    "Held",
    "PackedRows",
    "StreamDecoder",
    "TextData",
    "TokenStore",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "reopen",
    "require_length",
    "save_for_transformers",
    "single_document_windows",
    "token_dtype",
    "train_bpe",
]
