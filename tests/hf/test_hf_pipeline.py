import pytest
import torch
from hf_cases import hf_model
from transformers import AutoTokenizer, pipeline

from bmojo import BMojoByteTokenizer, BMojoLM
from bmojo.data import Document, load_tokenizer, train_bpe
from bmojo.data.tokenizers import save_for_transformers

PROMPTS = ["Once upon a time", "a", "Käse 東京"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    text = "the quick brown fox jumps over the lazy dog, naïve façade 東京 " * 20
    return train_bpe([Document("a", text)], 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def folder(request, bpe, tmp_path_factory):
    """A model folder as `bmojo train` leaves it."""
    tokenizer = bpe if request.param == "bpe" else load_tokenizer("bytes")
    path = tmp_path_factory.mktemp("run") / "model"
    hf_model("bmojo", torch.float32, vocab_size=tokenizer.vocab_size).model.save(path)
    save_for_transformers(tokenizer, path)
    return path, tokenizer


def test_the_tokenizer_beside_a_model(folder):
    path, tokenizer = folder
    found = AutoTokenizer.from_pretrained(path)
    assert isinstance(found, BMojoByteTokenizer) is (tokenizer.name == "bytes")
    assert found.padding_side == "left"
    assert len(found) == BMojoLM.load(path).config.vocab_size
    for text in [*PROMPTS, " don 't , do it !\n\n x"]:
        ids = found(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert found.decode(ids) == text


def test_text_generation(folder):
    path, tokenizer = folder
    generator = pipeline("text-generation", model=str(path), device="cpu")
    model = BMojoLM.load(path)
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, alone, strict=True):
        tokens = torch.tensor([tokenizer.encode(prompt).tolist()])
        for _ in range(8):
            tokens = torch.cat((tokens, model(tokens)[0][:, -1:].argmax(-1)), 1)
        assert text == tokenizer.decode(tokens[0].tolist()) or "\x00" in tokenizer.decode(tokens[0].tolist())
    if tokenizer.name == "bytes":
        batched = generator(PROMPTS, batch_size=3, **options)
        assert [one[0]["generated_text"] for one in batched] == alone
    sampled = generator(PROMPTS[0], do_sample=True, num_return_sequences=2, max_new_tokens=4, return_full_text=False)
    assert len(sampled) == 2
