"""A pretrained model, converted: is it the same model, and what does it lose and save in its sliding-window form?

    make corpus smollm2
    python benchmarks/real_model.py --out benchmarks/results/real_model.json [--model smollm2/NAME.gguf] [--text corpus]

The original runs in Transformers, the converted one here, both in float32 on one thread. On real text: logits, greedy
text and perplexity of both. Then one long text is streamed through four models: the original, the same with every layer
cut to a window (`bmojo convert --window`), that with the first tokens kept as well (eidetic slots, innovation="first":
the attention sinks of arXiv 2309.17453), all with the weights as they are. State bytes and perplexity by position.
Exits with 1 if the converted model is not the original, or a state that should be constant grows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from bmojo import BMojoLM
from bmojo.convert import convert
from bmojo.data.tokenizers import FileTokenizer
from bmojo.files import write_whole
from bmojo.generate import Stream
from bmojo.train.machine import cpu_name

PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")
SEGMENT = 256  # tokens a call
SINKS = 4
BARS = {"logits_rms": 1e-4, "nats": 1e-4}  # RMS difference over RMS; difference of nats per token


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", type=Path, default=Path("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--text", type=Path, default=Path("corpus"), help="a folder of .txt files")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--documents", type=int, default=4, help="texts to compare perplexity on")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of these")
    parser.add_argument("--stream", type=int, default=6144, help="tokens of the long text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    with tempfile.TemporaryDirectory() as work:
        done = convert(options.model, Path(work) / "full")
        short = convert(done.target, Path(work) / "swa", window=options.window)
        ours, swa = BMojoLM.load(done.target), BMojoLM.load(short.target)
        tokenizer = FileTokenizer(done.target / "tokenizer.json")
    theirs = AutoModelForCausalLM.from_pretrained(
        options.model.parent, gguf_file=options.model.name, dtype=torch.float32
    ).eval()
    sinks = BMojoLM(swa.config.replace(pattern=["bmojo"], eidetic_slots=SINKS, innovation="first"))
    sinks.load_state_dict(swa.state_dict())

    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(options.text.glob("*.txt"))}
    longest = max(texts, key=lambda name: len(texts[name]))
    chosen = [name for name in texts if name != longest][:: max(1, len(texts) // options.documents)]
    documents = [tokenizer.encode(texts[name])[: options.tokens] for name in chosen[: options.documents]]
    same = compare(theirs, ours, tokenizer, [torch.from_numpy(tokens.astype("int64"))[None] for tokens in documents])
    note("compared")

    long = torch.from_numpy(tokenizer.encode(texts[longest])[: options.stream].astype("int64"))[None]
    size = len(tokenizer.decode(long[0].numpy()).encode())
    forms = {}
    for name, calls in (
        ("original", read_original(theirs, long)),
        ("converted, the whole past", read_ours(ours, long)),
        (f"window {options.window}", read_ours(swa, long)),
        (f"window {options.window} and the first {SINKS} tokens", read_ours(sinks, long)),
    ):
        forms[name] = stream(calls, long, size)
        note(f"streamed {name}")

    grown = [name for name, form in forms.items() if "window" in name and not constant(form["state_bytes"])]
    broken = [name for name, bar in BARS.items() if not same[name] <= bar]
    broken += [name for name in ("greedy_equal",) if not same[name]] + grown
    report = {
        "model": {"file": options.model.name, "sha256": hashlib.sha256(options.model.read_bytes()).hexdigest()},
        "parameters": done.parameters,
        "text": {"folder": options.text.name, "compared": chosen[: options.documents], "streamed": longest},
        "bars": BARS,
        "broken": broken,
        "same": same,
        "stream": {"tokens": long.shape[1], "segment": SEGMENT, "forms": forms},
        "machine": {
            "cpu": cpu_name(), "threads": 1, "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip
    write_whole(options.out, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps({"same": same, "broken": broken}, indent=1))
    return 1 if broken else 0


def compare(theirs: Any, ours: BMojoLM, tokenizer: FileTokenizer, documents: list[Tensor]) -> dict[str, Any]:
    """Both models on the same text: the largest and the RMS difference of the logits, perplexities, greedy text."""
    largest = squares = total = 0.0
    agreed = count = 0
    nats = {"original": 0.0, "converted": 0.0}
    for tokens in documents:
        expected, got = theirs(tokens, use_cache=False).logits, ours(tokens)[0]
        largest = max(largest, float((got - expected).abs().max()))
        squares += float((got - expected).double().square().sum())
        total += float(expected.double().square().sum())
        agreed += int((got.argmax(-1) == expected.argmax(-1)).sum())
        count += tokens.shape[1]
        for name, logits in (("original", expected), ("converted", got)):
            nats[name] += float(costs(logits[:, :-1], tokens[:, 1:]).sum())
    scored = count - len(documents)
    size = sum(len(tokenizer.decode(tokens[0].numpy()).encode()) for tokens in documents)
    greedy = {prompt: (their_text(theirs, tokenizer, prompt), our_text(ours, tokenizer, prompt)) for prompt in PROMPTS}
    return {
        "documents": len(documents),
        "tokens": count,
        "logits_max": largest,
        "logits_rms": math.sqrt(squares / total),
        "argmax_agrees": agreed / count,
        "perplexity": {name: math.exp(value / scored) for name, value in nats.items()},
        "bits_per_byte": {name: value / math.log(2) / size for name, value in nats.items()},
        "nats": abs(nats["original"] - nats["converted"]) / scored,
        "greedy_equal": all(a == b for a, b in greedy.values()),
        "greedy": {prompt: b for prompt, (_, b) in greedy.items()},
    }


def their_text(model: Any, tokenizer: FileTokenizer, prompt: str, length: int = 40) -> str:
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=None
    )
    return tokenizer.decode(out[0, ids.shape[1] :].numpy())


def our_text(model: BMojoLM, tokenizer: FileTokenizer, prompt: str, length: int = 40) -> str:
    return "".join(Stream(model, tokenizer, temperature=0).feed(prompt).text(length))


def costs(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").double()


def read_original(model: Any, tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Logits of one segment after another, and the bytes that the cache takes then."""
    cache = transformers.DynamicCache(config=model.config)
    for part in tokens.split(SEGMENT, 1):
        logits = model(part, past_key_values=cache, use_cache=True).logits
        yield logits, sum(z.numel() * z.element_size() for layer in cache.layers for z in (layer.keys, layer.values))


def read_ours(model: BMojoLM, tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
    state = model.empty_state()
    for part in tokens.split(SEGMENT, 1):
        logits, state = model(part, state)
        yield logits, state.nbytes


def stream(calls: Iterator[tuple[Tensor, int]], tokens: Tensor, size: int) -> dict[str, Any]:
    """Perplexity of the whole text and by position (up to that token, from the one before), state bytes, seconds."""
    nats, bytes_, seconds, last = [], [], [], None
    clock = time.perf_counter()
    for part, (logits, nbytes) in zip(tokens.split(SEGMENT, 1), calls, strict=True):
        before = logits[:, :-1] if last is None else torch.cat((last, logits[:, :-1]), 1)
        nats.append(costs(before, part[:, part.shape[1] - before.shape[1] :]))
        last = logits[:, -1:]
        bytes_.append(nbytes)
        now = time.perf_counter()
        seconds.append(now - clock)
        clock = now
    every = torch.cat(nats)
    edges = [0, *(2**i for i in range(7, 30) if 2**i < len(every)), len(every)]
    pieces = {edges[i + 1]: every[edges[i] : edges[i + 1]] for i in range(len(edges) - 1)}
    return {
        "perplexity": math.exp(float(every.mean())),
        "bits_per_byte": float(every.sum()) / math.log(2) / size,
        "perplexity_by_position": {end: math.exp(float(piece.mean())) for end, piece in pieces.items()},
        "state_bytes": dict(zip(range(SEGMENT, tokens.shape[1] + SEGMENT, SEGMENT), bytes_, strict=False)),
        "seconds": {"first_segments": sum(seconds[:4]), "last_segments": sum(seconds[-4:]), "all": sum(seconds)},
    }


def constant(state_bytes: dict[int, int]) -> bool:
    return len(set(state_bytes.values())) == 1


def note(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
