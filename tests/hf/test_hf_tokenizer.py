import numpy as np
import pytest
from cases import small_preset
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bmojo import BMojoByteTokenizer, BMojoConfig
from bmojo.data import ByteTokenizer
from bmojo.errors import DataError

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
TOKENIZER = BMojoByteTokenizer()


@given(TEXT)
@example("\x00 a\x00")
@example("don 't , <0xE9> é\ufffd \r\n\t東😀")
def test_any_text_goes_there_and_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == ByteTokenizer().encode(text).tolist()
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text.replace("\x00", "")
    assert TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize(text)) == ids


@given(st.lists(st.integers(0, 255), max_size=20))
def test_any_bytes_are_decoded_as_by_ByteTokenizer(ids):
    assert TOKENIZER.decode(ids) == ByteTokenizer().decode(ids)
    assert TOKENIZER.convert_tokens_to_ids(TOKENIZER.convert_ids_to_tokens(ids)) == ids


def test_padding_on_the_left_and_decoding_in_batches():
    texts = ["a", "Käse", ""]
    batch = TOKENIZER(texts, padding=True, return_tensors="np")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist()[0] == [0, 0, 0, 0, ord("a")]
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [1, 5, 0])
    np.testing.assert_array_equal(batch["attention_mask"][0], [0, 0, 0, 0, 1])
    assert TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    assert TOKENIZER.batch_decode(batch["input_ids"])[0] == "\x00\x00\x00\x00a"
    assert TOKENIZER(texts, padding=True, padding_side="right")["attention_mask"][0] == [1, 0, 0, 0, 0]
    assert TOKENIZER("Käse", truncation=True, max_length=3)["input_ids"] == list(b"K\xc3\xa4")
    assert (len(TOKENIZER), TOKENIZER.vocab_size, TOKENIZER.pad_token_id) == (256, 256, 0)


def test_special_tokens_that_are_given():
    tokenizer = BMojoByteTokenizer(eos_token="\n", bos_token="é", sep_token="<sep>", pad_token="\x01")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (10, 1, 258)
    assert {tokenizer.bos_token_id, tokenizer.sep_token_id} == {256, 257}
    text = "né a\nb<sep><0xE9>"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "n ab<0xE9>"
    assert len(tokenizer.get_vocab()) == len(tokenizer)
    assert tokenizer.add_tokens(["hello"]) == 1
    assert tokenizer("hello")["input_ids"] == [258]


@pytest.mark.parametrize(
    "options", [{}, {"eos_token": "\n", "padding_side": "right"}, {"eos_token": "</s>", "model_max_length": 512}]
)
def test_saved_and_loaded(options, tmp_path):
    tokenizer = BMojoByteTokenizer(**options)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is BMojoByteTokenizer
    for name in ("eos_token_id", "pad_token_id", "padding_side", "model_max_length", "special_tokens_map"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    text = "a</s>\nKäse\x00"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()


def test_what_is_no_text_or_no_byte_is_refused():
    with pytest.raises(DataError, match="text is not valid Unicode: lone surrogate U"):
        TOKENIZER("a\ud800")
    with pytest.raises(DataError, match=r"byte ids must lie in 0..255, got 256"):
        TOKENIZER.decode([65, 256])


def test_a_folder_of_another_vocabulary_without_a_tokenizer_is_refused(tmp_path):
    BMojoConfig.from_core(small_preset("swa", vocab_size=300)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no tokenizer in .*vocabulary of 300 is not that of bytes; save"):
        AutoTokenizer.from_pretrained(tmp_path)
    BMojoConfig.from_core(small_preset("swa", vocab_size=256)).save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is BMojoByteTokenizer
