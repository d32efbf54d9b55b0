import json
import shutil

import pytest
import torch

from bmojo import BMojoLM, presets
from bmojo.data import ByteTokenizer, read_documents, train_bpe
from bmojo.data.synthetic import MQAR, make_task, task_record
from bmojo.eval import TokenLists, by_position, score_task

TASK = MQAR(length=32, pairs=2, keys=8, values=8)
SMALL = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "window": 8, "chunk_size": 8, "ssm_head_dim": 16}


def save_model(folder, task=None, **changes):
    torch.manual_seed(0)
    BMojoLM(presets.bmojo("tiny", **{**SMALL, "eidetic_slots": 4, **changes})).save(folder / "model")
    if task is not None:
        (folder / "task.json").write_text(json.dumps(task_record(task)))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that was "trained" on MQAR, with room for 16 more tokens than the task has."""
    return save_model(tmp_path_factory.mktemp("mqar"), TASK, vocab_size=32)


def changes(content):
    return [score["change"] for score in content["scores"]]


@pytest.mark.parametrize("verb", ["recall", "mad", "needle", "length"])
def test_every_verb_has_help(bmojo, verb):
    code, out, _ = bmojo("eval", verb, "--help")
    assert code == 0
    assert f"Usage: bmojo eval {verb}" in out


def test_a_task_whose_facts_change_shows_the_outdated_answers(tmp_path, bmojo):
    task = make_task("drift", length=64)
    folder = save_model(tmp_path, task, vocab_size=task.vocab_size)
    _, out, _ = bmojo("eval", "length", folder, "--rows", 8, "--lengths", 128)
    assert out.splitlines()[1].split()[-1] == "stale"


def test_recall_varies_what_the_model_was_trained_on(trained, bmojo):
    code, out, err = bmojo("eval", "recall", trained, "--rows", 4, "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["task"] == content["trained_on"] == task_record(TASK)
    lengths = [{"length": 32 * times} for times in (2, 4, 8, 16)]
    assert changes(content) == [{}, {"pairs": 1}, {"pairs": 4}, {"pairs": 8}, *lengths, {"filler": "alphabet"},
                                {"filler": "noise"}]  # fmt: skip
    assert [entry["change"] for entry in content["left_out"]] == [{"filler": "text"}]
    assert "vocab_size must be at least the task's 272, got 32" in content["left_out"][0]["reason"]
    expected = score_task(BMojoLM.load(trained / "model").eval(), TASK, rows=4)
    assert {"change": {}, **expected} == content["scores"][0]


def test_recall_as_a_table(trained, bmojo):
    code, out, _ = bmojo("eval", "recall", trained / "model", "--rows", 4, "--pairs", "1", "--lengths", "64")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("mqar, as the model was trained on it: length 32, seed 0, pairs 2, keys 8")
    assert lines[1].split() == ["accuracy", "95", "%", "interval", "chance", "bits", "questions"]
    assert [line[:14].strip() for line in lines[2:5]] == ["these settings", "pairs 1", "length 64"]
    assert "left out: filler text: vocab_size must be" in lines[-1]
    assert "by distance from the fact to the question" in out


def test_seed_and_batch_size(trained, bmojo):
    def scores(*options):
        command = ("eval", "recall", trained, "--rows", 4, "--pairs", 1, "--lengths", 64, "--filler", "constant")
        return json.loads(bmojo(*command, *options, "--json")[1])["scores"]

    assert scores() == scores("--seed", 0)
    assert scores() != scores("--seed", 1)
    assert [s["bits"] for s in scores("--batch-size", 1)] == pytest.approx([s["bits"] for s in scores()], rel=1e-5)


def test_recall_of_a_model_that_was_not_trained_on_it(run_folder, bmojo):
    code, out, _ = bmojo("eval", "recall", run_folder, "--rows", 2, "--lengths", 64, "--pairs", 2)
    assert code == 0
    assert out.startswith("mqar, not what the model was trained on, but settings that fit its vocabulary: length 128")


def test_length_of_a_task(trained, bmojo):
    content = json.loads(bmojo("eval", "length", trained, "--rows", 2, "--json")[1])
    assert changes(content) == [{}, *({"length": 32 * times, "gap": 32 * (times - 1)} for times in (2, 4, 8, 16))]
    content = json.loads(bmojo("eval", "length", trained, "--rows", 2, "--lengths", "32,40", "--json")[1])
    assert changes(content) == [{}, {"length": 40, "gap": 8}]


def test_length_of_text(run_folder, bmojo):
    code, out, err = bmojo("eval", "length", run_folder, "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["trained_at"] == 32
    assert [(row["from"], row["to"]) for row in content["by_position"]] == [(0, 32), (32, 64), (64, 128)]
    assert [entry["change"] for entry in content["left_out"]] == [{"length": 256}, {"length": 512}]
    code, out, _ = bmojo("eval", "length", run_folder)
    assert out.startswith("trained at 32 tokens\n")
    assert "left out: length 512: the longest document has" in out


def test_length_of_several_documents(run_folder, bmojo, corpus):
    _, out, _ = bmojo("eval", "length", run_folder, "--text", corpus, "--documents", 5, "--json")
    content = json.loads(out)
    model = BMojoLM.load(run_folder / "model").eval()
    store = TokenLists(read_documents(str(corpus)), ByteTokenizer())
    how = {"positions": [32, 64, 128], "documents": 5, "bytes_per_token": 1.0}
    expected = dict(by_position(model, store, **how))
    for row in content["by_position"]:
        low, high = row["ci95"]
        assert low < row["bits_per_byte"] < high
        assert row["documents"] == 5
        assert row["bits_per_byte"] == pytest.approx(expected[row["to"]])
    assert " to " in bmojo("eval", "length", run_folder, "--text", corpus)[1].splitlines()[2]


def test_length_of_other_text_at_given_lengths(run_folder, bmojo, corpus):
    _, out, _ = bmojo("eval", "length", run_folder / "model", "--text", corpus / "3.txt", "--lengths", 16, "--json")
    (row,) = json.loads(out)["by_position"]
    assert (row["from"], row["to"], row["documents"], row["ci95"]) == (0, 16, 1, None)


def test_refuses(trained, run_folder, tmp_path, refused):
    assert "no checkpoint at" in refused("eval", "recall", tmp_path / "missing")
    assert "config.json is missing" in refused("eval", "length", tmp_path)
    assert "--pairs takes whole numbers of at least 1" in refused("eval", "recall", trained, "--pairs", "4,x")
    assert "--lengths takes whole numbers" in refused("eval", "recall", trained, "--lengths", "0")
    assert "pairs must be between 1 and the number of keys (8), got 9" in refused(
        "eval", "recall", trained, "--pairs", 9
    )
    assert "length must be at least" in refused("eval", "length", trained, "--lengths", 4)
    assert "unknown filler 'noize'; did you mean 'noise'?" in refused("eval", "recall", trained, "--filler", "noize")
    assert "no document reaches 4,096 tokens" in refused("eval", "length", run_folder, "--lengths", "64,4096")
    bare = save_model(tmp_path / "bare", vocab_size=4)
    assert "does not say at what length it was trained; give --lengths" in refused("eval", "length", bare)
    assert "recall needs a vocabulary of at least 5 tokens, the model has 4" in refused("eval", "recall", bare)


def test_a_damaged_task_is_refused(tmp_path, refused):
    folder = save_model(tmp_path, vocab_size=17)
    for content, message in (
        ("{", "can't be read"),
        ("[1]", "must hold a JSON object, got list"),
        ("{}", "names no task"),
        ('{"name": "mqaar"}', "unknown task 'mqaar'; did you mean 'mqar'?"),
        ('{"name": "mqar", "length": 32}', "mqar needs the setting 'pairs'"),
        (json.dumps(task_record(TASK) | {"values": 9}), "vocab_size must be at least the task's 18, got 17"),
    ):
        (folder / "task.json").write_text(content)
        for verb in ("recall", "length"):
            if "mqaar" not in content or verb == "length":  # recall takes any other task for none
                assert message in refused("eval", verb, folder)
    (folder / "task.json").unlink()
    for content in ("{}", '{"settings": {"seq_len": 0}}'):
        (folder / "train.json").write_text(content)
        assert "has no seq_len of at least 1" in refused("eval", "length", folder)


def test_a_folder_named_as_a_verb_is_reached_by_its_path(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "recall", vocab_size=256)
    assert "recall keeps no held-out text; name some with --text" in refused("eval", "./recall")
    assert "checkpoint" in refused("eval", "recall")


def test_mad_of_what_the_model_was_trained_on(tmp_path, bmojo):
    task = make_task("selective_copying", length=64, symbols=8, copies=4)
    content = json.loads(bmojo("eval", "mad", save_model(tmp_path, task, vocab_size=64), "--rows", 2, "--json")[1])
    assert content["task"] == content["trained_on"] == task_record(task)
    lengths = [{"length": length} for length in (256, 512, 1024)]  # of the baseline, and harder
    assert changes(content) == [{}, *lengths, {"copies": 16}]
    left_out = {next(iter(entry["change"].items())): entry["reason"] for entry in content["left_out"]}
    assert left_out.keys() == {("symbols", 16), ("symbols", 32), ("symbols", 64), ("symbols", 128),
                               ("copies", 32), ("copies", 64), ("copies", 96)}  # fmt: skip
    assert left_out["symbols", 16].startswith(
        "its 16 tokens are not the ids of the 8 tokens that the model was trained"
    )
    assert "length must be at least" in left_out["copies", 32]


def test_mad_of_another_task(trained, bmojo):
    code, out, _ = bmojo("eval", "mad", trained, "--task", "selective_copying", "--rows", 2)
    assert code == 0
    assert out.startswith("selective_copying, not what the model was trained on, but settings that fit its vocabulary")
    assert "left out: symbols 64: vocab_size must be at least" in out


def test_mad_refuses(trained, run_folder, refused):
    assert "trained on mqar, which is not of MAD; name a task with --task: in_con" in refused("eval", "mad", trained)
    assert "trained on nothing that is known, which" in refused("eval", "mad", run_folder)
    assert "did you mean 'compression'?" in refused("eval", "mad", trained, "--task", "compresion")
    assert "at least the task's 256, got 32" in refused("eval", "mad", trained, "--task", "memorization")


def test_needle_of_a_model_of_text(run_folder, bmojo, tmp_path):
    picture = tmp_path / "figures/needle.png"
    options = ("--depths", "0,1", "--digits", 3, "--rows", 3)
    code, out, err = bmojo("eval", "needle", run_folder, *options, "--figure", picture, "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert (content["digits"], content["trained_at"], content["rows"], content["seed"]) == (3, 32, 3, 0)
    assert [entry["change"] for entry in content["left_out"]] == [{"length": 32}]
    sizes = [(32 * times, depth) for times in (2, 4, 8, 16) for depth in (0.0, 1.0)]
    assert [(cell["length"], cell["depth"]) for cell in content["cells"]] == sizes
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = bmojo("eval", "needle", run_folder, *options, "--lengths", 96)
    assert code == 0
    assert out.splitlines()[0] == "numbers of 3 digits, 3 texts a line; trained at 32 tokens"
    assert out.splitlines()[-1] == "a guess takes 9.97 bits"


def test_needle_as_the_model_was_trained_on_it(tmp_path, bmojo):
    folder = save_model(tmp_path, make_task("needle", length=80, digits=2), vocab_size=256)
    content = json.loads(bmojo("eval", "needle", folder, "--depths", "0.5", "--rows", 2, "--json")[1])
    assert (content["digits"], content["trained_at"]) == (2, 80)
    assert [cell["length"] for cell in content["cells"]] == [80, 160, 320, 640, 1280]


@pytest.mark.slow
def test_needle_in_the_tokens_of_another_tokenizer(tmp_path, bmojo, corpus):
    train_bpe(read_documents(str(corpus)), 300, tmp_path / "tokenizer.json")
    folder = save_model(tmp_path, vocab_size=300)
    code, out, _ = bmojo("eval", "needle", folder, "--lengths", 200, "--rows", 2, "--depths", 0.5, "--json")
    assert code == 0
    (cell,) = json.loads(out)["cells"]
    assert cell["length"] == 200


def test_needle_refuses(trained, run_folder, tmp_path, refused):
    assert "--depths takes numbers from 0 to 1" in refused("eval", "needle", run_folder, "--depths", "0,2")
    assert "length must be at least" in refused("eval", "needle", run_folder, "--lengths", "20")
    assert "the needle and its question, got 16; give --lengths" in refused(
        "eval", "needle", short(run_folder, tmp_path)
    )
    assert "name the tokenizer" in refused("eval", "needle", trained)
    bare = save_model(tmp_path / "bare", vocab_size=256)
    assert "does not say at what length it was trained; give --lengths" in refused("eval", "needle", bare)


def short(run_folder, folder):
    """The run, as if trained at a token."""
    shutil.copytree(run_folder, folder / "short")
    record = json.loads((run_folder / "train.json").read_text())
    record["settings"]["seq_len"] = 1
    (folder / "short/train.json").write_text(json.dumps(record))
    return folder / "short"
