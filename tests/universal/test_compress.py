import struct
import zlib

import numpy as np
import pytest
import torch
from google_crc32c import value as crc32c
from hypothesis import given
from hypothesis import strategies as st

from bmojo import BMojoLM, presets
from bmojo.data.documents import Document
from bmojo.data.tokenizers import FileTokenizer, train_bpe
from bmojo.errors import BMojoError, CompressionError
from bmojo.universal import compress as job
from bmojo.universal.byte_ctw import ByteCTW
from bmojo.universal.compress import LanguageModel, compress, decompress, read_head, split, to_bytes

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "ssm_head_dim": 8, "window": 8, "chunk_size": 8}
TEXT = "Ünd the cat sat on the mat;\nthe cat sat.\n"


def make_model(preset="bmojo", vocab_size=256, seed=0):
    torch.manual_seed(seed)
    return BMojoLM(presets.get(preset, "tiny", **SMALL, vocab_size=vocab_size)).eval()


@pytest.fixture(autouse=True)
def short_streams(monkeypatch):
    monkeypatch.setattr(job, "SHORTEST", 16)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    documents = [Document("a", TEXT * 5)]
    return train_bpe(documents, 270, tmp_path_factory.mktemp("bpe") / "bpe.json")


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """A tokenizer that loses case, spaces, and the words that it does not know."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = ["[UNK]", "\n", "the", "cat", "sat"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("lossy") / "words.json"
    backend.save(str(path))
    return FileTokenizer(path)


data = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(str.encode),
    st.lists(st.sampled_from([b"the cat sat", b"\n", b"\xff", b"\xe2\x82", "ü".encode(), b"sat"]), max_size=40).map(
        b"".join
    ),
)


@given(data=data, preset=st.sampled_from(["bmojo", "mamba2"]), streams=st.integers(1, 5))
def test_round_trip(data, preset, streams):
    coder = LanguageModel(make_model(preset), streams=streams)
    assert decompress(compress(data, coder), coder) == data


@pytest.mark.parametrize("context", [None, 1, 7])
def test_code_length_is_that_of_the_model(context):
    """-log2 p of each stream, read from an empty memory, the first token of a stream costing log2 of the vocabulary."""
    model, text = make_model(seed=1), (TEXT * 4).encode()
    ids, streams = torch.tensor(list(text)), 3
    steps = -(-len(ids) // streams)
    bits = 8.0 * streams
    with torch.no_grad():
        for row in ids.split(steps):
            for start in range(0, len(row), context or len(row)):
                part = row[start : start + (context or len(row)) + 1]
                logits, _ = model(part[None])
                logp = logits[0, : len(part) - 1].double().log_softmax(-1)
                bits -= float(logp.gather(1, part[1:, None]).sum()) / np.log(2)
    head, code = read_head(compress(text, LanguageModel(model, streams=streams, context=context)))
    beside = struct.unpack_from("<4I", code)[3]
    assert 8 * (len(code) - 16 - beside) == pytest.approx(bits, abs=10)
    assert head["length"] == len(text)


@given(data=data)
def test_any_bytes_in_pieces(bpe, lossy, data):
    for tokenizer in (None, bpe, lossy):
        pieces = list(split(data, tokenizer))
        joined = b"".join(p if isinstance(p, bytes) else to_bytes(p, tokenizer) for p in pieces)
        assert joined == data


def test_text_is_one_piece_and_noise_another(bpe, lossy):
    text = TEXT.encode()
    assert len(list(split(text, bpe))) == 1
    first, raw, last = split(text + b"\xff\xfe ab \xff" + text, bpe)
    assert raw == b"\xff\xfe ab \xff"
    np.testing.assert_array_equal(first, last)
    assert list(split(b"", bpe)) == []
    assert list(split(b"sat \nThe CAT", lossy)) == [b"sat \n", b"The CAT"]
    assert len(list(split(np.random.default_rng(0).bytes(100_000), bpe))) < 2000


@pytest.mark.parametrize("which", ["bpe", "lossy"])
def test_round_trip_with_tokenizers(which, bpe, lossy):
    tokenizer = {"bpe": bpe, "lossy": lossy}[which]
    coder = LanguageModel(make_model(vocab_size=tokenizer.vocab_size + 3), tokenizer, streams=2)
    for data in (b"", TEXT.encode() * 3, b"sat\n" + TEXT.encode() + b"\xff\xfe" + bytes(range(256)), b"\n", b"\xff"):
        assert decompress(compress(data, coder), coder) == data


def test_progress_ends_at_the_end(bpe):
    for coder in (ByteCTW(2), LanguageModel(make_model(), streams=3), LanguageModel(make_model(vocab_size=270), bpe)):
        told, text = [], TEXT.encode() * 3
        packed = compress(text, coder, told.append)
        decompress(packed, coder, told.append)
        half = len(told) // 2
        assert told[:half] == told[half:] == sorted(told[:half])
        assert told[-1] == len(text)


@given(data=data, at=st.floats(0, 1), bit=st.integers(0, 7))
def test_damage_is_refused(data, at, bit):
    packed = bytearray(compress(data, ByteCTW(2)))
    packed[int(at * (len(packed) - 1))] ^= 1 << bit
    with pytest.raises(CompressionError, match=r"damaged|cut off|no file|update bmojo"):
        decompress(bytes(packed), ByteCTW(2))


def test_every_truncation_is_refused():
    packed = compress(TEXT.encode(), ByteCTW(2))
    for size in range(len(packed)):
        with pytest.raises(CompressionError, match=r"damaged|cut off|no file"):
            decompress(packed[:size], ByteCTW(2))
    with pytest.raises(CompressionError, match="damaged"):
        decompress(packed + b"\0", ByteCTW(2))


def test_another_coder_is_refused(bpe):
    model = make_model(vocab_size=270)
    packed = compress(b"abc", LanguageModel(model, bpe))
    with pytest.raises(CompressionError, match=f"fingerprint is {model.fingerprint()}, that of this one"):
        decompress(packed, LanguageModel(make_model(vocab_size=270, seed=1), bpe))
    for settings, name in (({"streams": 3}, "streams"), ({"context": 5}, "context")):
        with pytest.raises(CompressionError, match=f"its {name} is"):
            decompress(packed, LanguageModel(model, bpe, **settings))
    with pytest.raises(CompressionError, match="another coder"):
        decompress(packed, ByteCTW())
    with pytest.raises(CompressionError, match="its depth is 2"):
        decompress(compress(b"abc", ByteCTW(2)), ByteCTW(3))


def test_the_tokenizer_must_fit(bpe):
    with pytest.raises(CompressionError, match="the model has 256 tokens, the tokenizer bpe 270"):
        LanguageModel(make_model(), bpe)
    with pytest.raises(CompressionError, match="the model has 300 tokens, bytes 256"):
        LanguageModel(make_model(vocab_size=300))


@pytest.mark.parametrize("settings", [{"streams": 0}, {"context": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(CompressionError, match="at least 1"):
        LanguageModel(make_model(), **settings)


def test_what_rounds_otherwise_is_told_and_never_given(monkeypatch):
    coder = LanguageModel(make_model(), threads=1)
    packed, text = compress(TEXT.encode(), coder), TEXT.encode()
    with pytest.warns(UserWarning, match=r"threads 1 \(here 2\)"):
        assert decompress(packed, LanguageModel(coder.model, threads=2)) == text
    honest = job.quantise
    monkeypatch.setattr(job, "quantise", lambda p: honest(p)[:, ::-1].copy())
    with pytest.raises(CompressionError, match="did not come out as they were: the file is whole"):
        decompress(packed, coder)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    compress(b"abc", LanguageModel(make_model(), threads=before + 1))
    assert torch.get_num_threads() == before


def test_a_model_that_predicts_nonsense_is_told():
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(BMojoError, match="the coder takes probabilities"):
        compress(b"abc", LanguageModel(model))


def test_heads_are_short():
    assert len(compress(b"", ByteCTW())) < 60
    assert len(compress(b"", LanguageModel(make_model()))) < 130


def test_files_of_later_formats_are_refused():
    packed = bytearray(compress(b"", ByteCTW(0)))
    packed[3] = 2
    with pytest.raises(CompressionError, match="format 2, this bmojo reads up to 1; update bmojo"):
        decompress(bytes(packed), ByteCTW(0))


def test_a_head_that_says_something_else_is_refused():
    for text in (b"[1]", b"{}", b'{"code": "x"}', b"\xff", b" " * 2**17 + b'{"code": 0}', None):
        head = b"{}" if text is None else zlib.compress(text)
        whole = struct.pack("<3sBI", b"bmz", 1, len(head)) + head
        with pytest.raises(CompressionError, match="damaged"):
            read_head(whole + struct.pack("<I", crc32c(whole)))
