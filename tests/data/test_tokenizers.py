import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmojo.data.documents import Document
from bmojo.data.tokenizers import ByteTokenizer, FileTokenizer, load_tokenizer, token_dtype, train_bpe
from bmojo.errors import BMojoError, DataError

WORDS = "the quick brown fox jumps over the lazy dog, naïve façade 東京 😀 " * 20
DOCUMENTS = [Document("a", WORDS), Document("b", WORDS[::-1])]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(DOCUMENTS, 300, tmp_path_factory.mktemp("bpe") / "bpe300.json")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example(text="\ufffd naïve \ufffd")
@example(text="a😀\u0301 \r\n\t東")
def test_round_trip_whole_and_streamed(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == token_dtype(tokenizer.vocab_size)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(int(id)) for id in ids) + stream.flush() == text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=40))
@example(ids=[0xE2, 0x82])
def test_streaming_any_bytes_agrees_with_decode(tokenizer, ids):
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(id) for id in ids) + stream.flush() == tokenizer.decode(ids)
    text, stream = "", tokenizer.stream_decoder()
    for id in ids:
        text += stream.push(id)
        stream = tokenizer.stream_decoder(stream.held)
    assert text + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["é", "東", "😀"])
def test_a_character_appears_with_its_last_byte(text):
    stream = ByteTokenizer().stream_decoder()
    data = text.encode()
    assert [stream.push(byte) for byte in data] == [""] * (len(data) - 1) + [text]
    assert stream.flush() == ""


def test_an_incomplete_character_is_held_back_until_flush(tokenizer):
    ids = tokenizer.encode("ab☃")
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(int(id)) for id in ids[:-1]) == "ab"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_streaming_keeps_the_space_before_a_word(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "words.json"))
    tokenizer = FileTokenizer(tmp_path / "words.json")
    stream = tokenizer.stream_decoder()
    assert [stream.push(int(id)) for id in tokenizer.encode("hello world world")] == ["hello", " world", " world"]


def test_bytes_are_utf8():
    ids = ByteTokenizer().encode("aé")
    np.testing.assert_array_equal(ids, [97, 0xC3, 0xA9])
    assert ids.dtype == np.uint8
    with pytest.raises(DataError, match=r"0\.\.255, got 97\.\.300"):
        ByteTokenizer().decode([97, 300])


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_token_dtype_is_the_smallest_that_fits(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"U\+D800 at character 1"):
        tokenizer.encode("a\ud800")


def test_training_is_deterministic_and_reloads(tmp_path, bpe):
    again = train_bpe(iter(DOCUMENTS), 300, tmp_path / "new" / "bpe300.json")
    assert again.sha256 == bpe.sha256
    assert again.vocab_size == 300
    assert again.name == "bpe300"
    loaded = load_tokenizer(str(again.path))
    np.testing.assert_array_equal(loaded.encode(WORDS), bpe.encode(WORDS))
    assert [path.name for path in again.path.parent.iterdir()] == ["bpe300.json"]


def test_training_errors(tmp_path):
    with pytest.raises(DataError, match=r"at least 256 .*, got 255"):
        train_bpe(DOCUMENTS, 255, tmp_path / "a.json")
    with pytest.warns(UserWarning, match="the text gives only 258 tokens of the 1000"):
        train_bpe([Document("a", "aa aa")], 1000, tmp_path / "a.json")
    (tmp_path / "file").touch()
    with pytest.raises(BMojoError, match=r"can't write .*a\.json"):
        train_bpe(DOCUMENTS, 260, tmp_path / "file" / "a.json")


def test_load_tokenizer_errors(tmp_path):
    assert load_tokenizer("bytes").name == "bytes"
    with pytest.raises(DataError, match="did you mean 'bytes'"):
        load_tokenizer("byte")
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"model": 1}))
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_tokenizer(str(broken))


def test_an_empty_vocabulary_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(DataError, match="empty vocabulary"):
        FileTokenizer(tmp_path / "empty.json")
