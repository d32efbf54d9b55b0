import json
import shutil

import pytest

from bmojo import BMojoLM
from bmojo.data import TextData
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
    assert "does not belong to its config.json" in refused("eval", damaged, "--text", corpus)


def test_a_model_without_its_tokenizer_is_refused(tmp_path, refused, corpus, run_folder):
    model = BMojoLM(BMojoLM.load(run_folder / "model").config.replace(vocab_size=300))
    model.save(tmp_path / "model")
    assert "name the model's tokenizer with --tokenizer" in refused("eval", tmp_path / "model", "--text", corpus)
