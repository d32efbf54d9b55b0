"""Streams with a store in FOLDER until killed, and tells of what it has come to. Run by test_stream_killed.py.

python tests/generate/stream_kill_script.py FOLDER
"""

import sys
from pathlib import Path

import torch

from bmojo import BMojoLM, Store, Stream, presets

SAVE = 40  # tokens between two times that the stream is saved


def model() -> BMojoLM:
    torch.manual_seed(0)
    return BMojoLM(presets.get(
        "bmojo", "tiny", vocab_size=50, hidden_size=16, num_heads=2, num_layers=1, chunk_size=8, window=16,
        ssm_head_dim=8, storage_layers=(0,), storage_block=8, storage_stride=4, storage_keys=2, storage_queries=2,
    )).eval()  # fmt: skip


def main() -> None:
    folder, reader = Path(sys.argv[1]), model()
    path = folder / "stream.safetensors"
    with Store.open(folder / "store", reader, publish=0) as store:
        stream = Stream.load(path, reader, store=store) if path.exists() else Stream(reader, store=store, name="mine")
        if not stream.length:
            stream.feed([1, 2, 3])
        while True:
            list(stream.generate(SAVE))
            store.flush()
            print("flushed", store.stats()["blocks"], flush=True)
            stream.save(path)
            print("saved", stream.length, flush=True)


if __name__ == "__main__":
    main()
