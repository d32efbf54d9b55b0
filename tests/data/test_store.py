import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bmojo.data import documents as documents_module
from bmojo.data import store as store_module
from bmojo.data.documents import Document
from bmojo.data.store import TextData, prepare, reopen, require_length
from bmojo.data.tokenizers import ByteTokenizer, train_bpe
from bmojo.errors import CheckpointError, DataError

BYTES = ByteTokenizer()


def write_corpus(folder, texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", [f"Dokument {i} für alle\n" * (i + 1) for i in range(40)])


def texts_of(side):
    return [BYTES.decode(side[i]) for i in range(len(side))]


def test_every_document_is_on_one_side_whole_and_in_order(tmp_path, corpus):
    data = prepare(corpus, BYTES, tmp_path / "store", held_out=0.3)
    train, evaluation = texts_of(data.train), texts_of(data.eval)
    expected = [document.text for document in documents_module.read_documents(corpus)]
    assert sorted(train + evaluation) == sorted(expected)
    for side in (train, evaluation):
        assert side == [text for text in expected if text in set(side)]
        assert len(side) > 5
    for side in (data.train, data.eval):
        assert isinstance(side[0], np.memmap)
        assert side[0].dtype == np.uint8
        assert side.num_tokens == side.lengths.sum() == side.bytes.sum()
        with pytest.raises(IndexError):
            side[len(side)]
    assert data.meta["held_out_by"] == "document"
    assert data.corpus_record() == {
        "name": "corpus",
        "bytes_train": sum(len(text.encode()) for text in train),
        "bytes_eval": sum(len(text.encode()) for text in evaluation),
        "documents_train": len(train),
        "documents_eval": len(evaluation),
        "sha256": data.meta["sha256"],
    }


def test_same_settings_same_bytes_other_seed_other_split(tmp_path, corpus):
    one, two, other = (
        prepare(corpus, BYTES, tmp_path / name, seed=seed) for name, seed in [("1", 0), ("2", 0), ("3", 5)]
    )
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes()
    assert texts_of(one.eval) != texts_of(other.eval)
    assert one.meta["sha256"] == other.meta["sha256"]


def test_the_name_of_a_corpus_is_its_last_part(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert prepare(".", BYTES, tmp_path / "store").corpus_record()["name"] == "corpus"


def test_other_tokenizers_and_their_width(tmp_path, corpus):
    tokenizer = train_bpe(documents_module.read_documents(corpus), 270, tmp_path / "bpe.json")
    data = prepare(corpus, tokenizer, tmp_path / "store")
    assert data.train[0].dtype == np.uint16
    assert tokenizer.decode(data.train[0]).startswith("Dokument")
    assert data.train.num_tokens < data.train.bytes.sum()


def test_reused_only_with_the_same_settings_and_files(tmp_path, corpus, monkeypatch):
    reads = []
    read_documents = store_module.read_documents
    monkeypatch.setattr(
        store_module, "read_documents", lambda *args, **options: reads.append(1) or read_documents(*args, **options)
    )
    folder = tmp_path / "store"
    prepare(corpus, BYTES, folder)
    prepare(corpus, BYTES, folder)
    assert len(reads) == 1
    prepare(corpus, BYTES, folder, held_out=0.1)
    assert len(reads) == 2
    with open(tmp_path / "corpus" / "000.txt", "a") as file:
        file.write("more")
    changed = prepare(corpus, BYTES, folder, held_out=0.1)
    assert len(reads) == 3
    assert any("more" in text for text in texts_of(changed.train) + texts_of(changed.eval))
    (folder / "train.bin").write_bytes(b"cut short")
    prepare(corpus, BYTES, folder, held_out=0.1)
    assert len(reads) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"]


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty(tmp_path, held_out):
    source = write_corpus(tmp_path / "corpus", ["first", "second", "the last"])
    data = prepare(source, BYTES, tmp_path / "store", held_out=held_out)
    few, many = (data.eval, data.train) if held_out < 0.5 else (data.train, data.eval)
    assert texts_of(few) == ["the last"]
    assert texts_of(many) == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("0123456\n" * 20, "0123456\n" * 18),
        ("0123\n" * 20 + "x" * 6, "0123\n" * 19),
        ("x" * 100, "x" * 90),
        ("ab", "a"),
        ("\n" + "é" * 99, "\n" + "é" * 89),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_single_document_is_split_near_a_line_end(tmp_path, text, head, seed):
    path = tmp_path / "one.txt"
    path.write_text(text)
    data = prepare(str(path), BYTES, tmp_path / "store", held_out=0.1, seed=seed)
    assert texts_of(data.train) == [head]
    assert texts_of(data.eval) == [text[len(head) :]]
    assert data.meta["held_out_by"] == "end of the only document"
    assert data.corpus_record()["documents_train"] == data.corpus_record()["documents_eval"] == 1


def test_one_character_is_too_short(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match="too short"):
        prepare(str(tmp_path / "one.txt"), BYTES, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_documents_without_tokens_are_left_out(tmp_path):
    class Digits(ByteTokenizer):
        def encode(self, text):
            return super().encode("".join(filter(str.isdigit, text)))

    source = write_corpus(tmp_path / "corpus", ["1", "none", "22", "333", "none"])
    data = prepare(source, Digits(), tmp_path / "store")
    assert sorted(texts_of(data.train) + texts_of(data.eval)) == ["1", "22", "333"]


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataError, "no space left: .*free some space"),
        (OSError(errno.EIO, "Input/output error"), DataError, "Input/output error: can't write"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (DataError("bad text"), DataError, "bad text"),
    ],
)
def test_a_failure_midway_leaves_nothing_and_keeps_what_was_there(
    tmp_path, corpus, monkeypatch, failure, expected, message
):
    def documents(*_, **__):
        yield Document("a", "text")
        raise failure

    folder = tmp_path / "store"
    for before in (False, True):
        if before:
            monkeypatch.undo()
            prepare(corpus, BYTES, folder)
        monkeypatch.setattr(store_module, "read_documents", documents)
        with pytest.raises(expected, match=message):
            prepare(corpus, BYTES, folder, seed=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"][: 1 + before]
    assert TextData(folder).meta["settings"]["seed"] == 0


def test_killed_midway_leaves_no_store(tmp_path, corpus):
    script = """
        import os, signal, sys
        from bmojo.data import ByteTokenizer, prepare

        class Killer(ByteTokenizer):
            calls = 0
            def encode(self, text):
                self.calls += 1
                if self.calls == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode(text)

        prepare(sys.argv[1], Killer(), sys.argv[2])
    """
    folder = tmp_path / "store"
    command = [sys.executable, "-c", textwrap.dedent(script), corpus, str(folder)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not folder.exists()
    assert len(prepare(corpus, BYTES, folder).train)


def test_another_process_that_finished_first_wins(tmp_path, corpus, monkeypatch):
    folder = tmp_path / "store"
    write = store_module._write

    def slow_write(*args):
        counts = write(*args)
        if not folder.exists():
            monkeypatch.setattr(store_module, "_write", write)
            prepare(corpus, BYTES, folder)
        return counts

    monkeypatch.setattr(store_module, "_write", slow_write)
    assert len(prepare(corpus, BYTES, folder).train)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"]


def test_a_foreign_folder_is_never_replaced(tmp_path, corpus):
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "keep.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other things"):
        prepare(corpus, BYTES, foreign)
    with pytest.raises(DataError, match="holds other things"):
        prepare(corpus, BYTES, foreign / "keep.txt")
    assert (foreign / "keep.txt").read_text() == "mine"


def test_a_damaged_store_is_refused(tmp_path, corpus):
    whole = prepare(corpus, BYTES, tmp_path / "store").folder
    meta = json.loads((whole / "meta.json").read_text())
    meta["settings"]["version"] = 99
    for name, content in [
        ("meta.json", b"{"),
        ("meta.json", b"[]"),
        ("meta.json", json.dumps(meta).encode()),
        ("eval.bin", b""),
        ("train.bin", b"abc"),
        ("train.bytes.npy", b"abc"),
    ]:
        damaged = shutil.copytree(whole, tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / name).write_bytes(content)
        with pytest.raises(DataError, match="not a whole token store"):
            TextData(damaged)
    os.remove(damaged / "eval.starts.npy")
    with pytest.raises(DataError, match="not a whole token store"):
        TextData(damaged)
    with pytest.raises(DataError, match="not a whole token store"):
        TextData(tmp_path / "nowhere")


@pytest.mark.parametrize("held_out", [0, 1, -0.1, float("nan")])
def test_held_out_is_a_fraction(tmp_path, corpus, held_out):
    with pytest.raises(DataError, match="between 0 and 1"):
        prepare(corpus, BYTES, tmp_path / "store", held_out=held_out)


def test_a_store_that_a_run_began_with_must_be_whole(tmp_path, corpus):
    prepare(corpus, BYTES, tmp_path / "store")
    assert len(reopen(corpus, tmp_path / "store").train)
    (tmp_path / "store/train.bin").write_bytes(b"cut")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"store is gone or damaged \(.+ text that it began with; use another"
        ):
            reopen(corpus, tmp_path / "store")
        shutil.rmtree(tmp_path / "store", ignore_errors=True)


def test_require_length(tmp_path):
    data = prepare(write_corpus(tmp_path / "corpus", ["abc", "de", "f"]), BYTES, tmp_path / "store", held_out=1e-9)
    with pytest.raises(DataError, match="shorter than a window: 5 training tokens, expected at least 6"):
        require_length(data, 6)
    with pytest.raises(DataError, match="no held-out document has two tokens"):
        require_length(data, 5)
    longer = prepare(write_corpus(tmp_path / "longer", ["abc", "de"]), BYTES, tmp_path / "store2")
    require_length(longer, 2)
