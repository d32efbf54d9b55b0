import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from bmojo import BMojoLM
from bmojo.cli.diagnose import in_words
from bmojo.eval.diagnose import Diagnosis, Probe, choose, diagnose, read, token_basis


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Long enough for lags to 64."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five\n"], 800)
    path.write_text(" ".join(words))
    return path


def test_prints_draws_and_writes(run_folder, text, bmojo, tmp_path):
    plot, out = tmp_path / "plot.png", tmp_path / "out.json"
    code, told, err = bmojo("diagnose", run_folder, "--text", text, "--lags", "1,4,64", "--plot", plot, "--out", out)
    assert (code, err) == (0, "")
    assert "not white" in told
    assert "5 to 64" in told
    assert max(map(len, told.splitlines()[:6])) <= 80
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, printed, _ = bmojo("diagnose", run_folder, "--text", text, "--lags", "1,4,64", "--json")
    assert json.loads(printed) == json.loads(out.read_text())


def test_the_commands_of_the_docs_run(run_folder, text, bmojo, tmp_path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs/diagnose.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```bash\n(.*?)^```$", docs, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        _, *arguments = shlex.split(line.replace("FOLDER", str(run_folder)).replace("TEXT", str(text)))
        assert bmojo(*arguments)[::2] == (0, ""), line
    assert {path.name for path in tmp_path.iterdir()} == {"errors.png", "errors.json"}


def test_tells_what_the_library_finds(run_folder, text, bmojo):
    _, out, _ = bmojo("diagnose", run_folder, "--text", text, "--channels", 4, "--json", "--max-tokens", 3000)
    content = json.loads(out)
    model = BMojoLM.load(run_folder / "model")
    store = [np.frombuffer(text.read_bytes()[:3000], np.uint8)]
    chosen = choose(_Store(store))
    found = diagnose(read(model, chosen, token_basis(chosen.counts(256), model.embed.weight, channels=4)), chosen.bands)
    assert content["lag_shares"] == pytest.approx(found.lag_shares, rel=1e-6)
    assert content["text"][0]["share"] == pytest.approx(found.text[0].share, rel=1e-6)
    assert content["left_out"][-1].endswith("beyond the first 3,000")


class _Store:
    def __init__(self, documents):
        self.documents, self.lengths = documents, np.array([len(document) for document in documents])

    def __getitem__(self, number):
        return self.documents[number]

    def __len__(self):
        return len(self.documents)


def test_refuses(run_folder, text, tmp_path, refused, corpus):
    assert "no checkpoint at" in refused("diagnose", tmp_path / "missing", "--text", text)
    assert "name some with --text" in refused("diagnose", run_folder / "model")
    assert "no text at" in refused("diagnose", run_folder, "--text", tmp_path / "missing.txt")
    assert "too short: lags up to 1 need 1,025 tokens" in refused("diagnose", run_folder, "--text", corpus / "3.txt")
    assert "lags up to 4,096 need 32,769 tokens" in refused("diagnose", run_folder, "--text", text, "--lags", "1,4096")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused("diagnose", run_folder, "--text", tmp_path / "empty.txt")
    (tmp_path / "same.txt").write_text("a" * 5000)
    assert "one token over and over" in refused("diagnose", run_folder, "--text", tmp_path / "same.txt")
    for option, value, message in (
        ("--lags", "4,1", "ascend from at least 1, got 4,1"),
        ("--lags", "none", "got 'none'"),
        ("--plot", "plot.pdf", "path of a .png, got plot.pdf"),
        ("--features", "onehot", "one of embedding, one-hot, got 'onehot'"),
    ):
        assert message in refused("diagnose", run_folder, "--text", text, option, value)


def probes(fails, share=0.01):
    return [Probe(share * (i + 1), (0.0, 0.1), 0.0, fail) for i, fail in enumerate([*fails, any(fails)])]


@pytest.mark.parametrize(
    ("text_fails", "reach", "expected"),
    [
        ((False, False), 4, "white: nothing tried predicts the errors"),
        ((False, True), 4, "so it lacks memory, at lags 5 to 16: 2.000 % of their variance (95 % interval 0.000 to"),
        ((True, False), 4, "what came before them does not predict its errors"),
        ((True, False), 4, "so it lacks training or size, at lags 1 to 4: 1.000 %"),
        ((True, True), 4, "so memory would help, unless training makes it needless, at lags 5 to 16: 2.000 %"),
        ((True, True), 4, "what it knows predicts its errors, so training or size would help, at lags 1 to 4"),
        ((False, True), 9, "lags 5 to 16 fail, in part known and in part not: end --lags at 9 to tell which"),
        ((False, True), 9, "what came before them does not predict its errors"),
        ((True, True), 9, "from the text before, its errors are predictable at lags 1 to 16, most at 5 to 16: 2.000 %"),
        ((True, True), None, "no lag is out of this model's reach"),
    ],
)
def test_says_in_words_what_is_lacking(text_fails, reach, expected):
    assert expected in "\n".join(in_words(a_diagnosis(probes(text_fails)), reach))


def a_diagnosis(text, p=0.5):
    none = probes((False, False))
    return Diagnosis(2000, 4, p, [1], [0.0], [0.5], [], [(1, 4), (5, 16)], none, text, none, 0.01)


def test_repeats_alone_are_no_lack_of_memory():
    none = probes((False, False))
    found = Diagnosis(2000, 4, 0.5, [1], [0.0], [0.5], [], [(1, 4), (5, 16)], none, none, probes((False, True)), 0.01)
    assert "so memory would help, unless training makes it needless" in "\n".join(in_words(found, 4))


def test_does_not_call_white_what_all_lags_together_reject():
    words = in_words(a_diagnosis(probes((False, False)), p=0.001), 4)
    assert words == ["not white: all lags together say so (p = 0.001), but none by itself, and no band"]
