import json
import shutil

import pytest

from bmojo import BMojoLM
from bmojo.data import TextData, read_documents, train_bpe
from bmojo.eval import score_documents


def test_scores_the_held_out_text_of_the_run(run_folder, bmojo):
    code, out, err = bmojo("eval", run_folder, "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    expected = score_documents(BMojoLM.load(run_folder / "model"), TextData(run_folder / "data").eval)
    assert content["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert content["ci95"] == pytest.approx(expected.ci95)
    assert [position for position, _ in content["by_position"]] == [64, 128]
    code, out, _ = bmojo("eval", run_folder)
    assert f"{expected.bits_per_byte:.4f} bits per byte, 95 % interval" in out
    assert "over whole documents, the state carried" in out


def test_context_empties_the_state(run_folder, bmojo):
    _, out, _ = bmojo("eval", run_folder, "--context", 32, "--json")
    content = json.loads(out)
    model, store = BMojoLM.load(run_folder / "model"), TextData(run_folder / "data").eval
    assert content["bits_per_byte"] == pytest.approx(score_documents(model, store, context=32).bits_per_byte)
    assert content["context"] == 32
    assert "the state emptied after every 32 tokens" in bmojo("eval", run_folder, "--context", 32)[1]


def test_text_too_short_for_scores_by_position(run_folder, bmojo, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    code, out, _ = bmojo("eval", run_folder, "--text", tmp_path / "short.txt", "--json")
    assert (code, json.loads(out)["by_position"]) == (0, [])
    assert bmojo("eval", run_folder, "--text", tmp_path / "short.txt")[0] == 0


def test_scores_any_text_with_a_model_folder(run_folder, bmojo, corpus):
    code, out, _ = bmojo("eval", run_folder / "model", "--text", corpus / "3.txt", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == (corpus / "3.txt").stat().st_size


def test_refuses(run_folder, tmp_path, refused, corpus):
    assert "no checkpoint at" in refused("eval", tmp_path / "missing", "--text", corpus)
    assert "config.json is missing" in refused("eval", tmp_path, "--text", corpus)
    assert "name some with --text" in refused("eval", run_folder / "model")
    assert "no text at" in refused("eval", run_folder, "--text", tmp_path / "missing.txt")
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder / "model", damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "is corrupt" in refused("eval", damaged, "--text", corpus)
    (damaged / "config.json").write_text('{"model_type": "gpt2"}')
    assert "is not a bmojo configuration" in refused("eval", damaged, "--text", corpus)
    (damaged / "model.safetensors").write_bytes(weights)
    (damaged / "config.json").write_text((run_folder / "model/config.json").read_text().replace("256", "300"))
    assert "do not belong to its config.json" in refused("eval", damaged, "--text", corpus)


def test_a_model_without_its_tokenizer_is_refused(tmp_path, refused, corpus, run_folder):
    model = BMojoLM(BMojoLM.load(run_folder / "model").config.replace(vocab_size=300))
    model.save(tmp_path / "model")
    assert "name the tokenizer that the model was trained with" in refused("eval", tmp_path / "model", "--text", corpus)


def test_the_tokenizer_must_have_the_size_of_the_vocabulary(tmp_path, refused, bmojo, corpus, run_folder):
    path = tmp_path / "tokenizer.json"
    train_bpe(read_documents(str(corpus)), 260, path)
    config = BMojoLM.load(run_folder / "model").config
    BMojoLM(config.replace(vocab_size=300)).save(tmp_path / "model")
    message = f"tokenizer {path} has 260 tokens, the model in"
    assert message in refused("eval", tmp_path / "model", "--text", corpus, "--tokenizer", path)
    assert f"{path} has 260 tokens; name" in refused("eval", tmp_path / "model", "--text", corpus)
    BMojoLM(config.replace(vocab_size=260)).save(tmp_path / "text/bmojo/model")
    assert bmojo("eval", tmp_path / "text/bmojo/model", "--text", corpus)[0] == 0
    BMojoLM(config).save(tmp_path / "bytes")
    assert bmojo("eval", tmp_path / "bytes", "--text", corpus)[0] == 0
    BMojoLM(config.replace(vocab_size=260)).save(tmp_path / "too/far/away/from/it")
    assert "no tokenizer.json of 260 tokens in" in refused("eval", tmp_path / "too/far/away/from/it", "--text", corpus)
