"""The LM Evaluation Harness: scores and texts equal a direct computation with BMojoLM, alone and in any batch."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import lm_eval
import pytest
import torch
from cases import make_model, small_preset
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

import bmojo_lm_eval
from bmojo import BMojoByteTokenizer, BMojoConfig, BMojoForCausalLM, BMojoLM
from bmojo.data import train_bpe
from bmojo.data.documents import Document
from bmojo.errors import CheckpointError, ConfigError, DataError, MissingPackageError
from bmojo.eval import harness
from bmojo.eval.harness import HarnessLM

PRESETS = ("transformer", "mamba2", "bmojo")
LINE_FEED = 10
PAIRS = [
    ("The grass is green, and the sky", " is blue"),
    ("Q: two and two?\nA:", " 4"),  # these three are read once
    ("Q: two and two?\nA:", " 5"),
    ("Q: two and two?\nA:", " four"),
    ("a", "b"),
    ("", "without a context"),
    ("spaces at the end  ", "belong to what follows"),
    ("ü" * 20, "\x00 a real zero\x00"),
]
TEXTS = ["One short line.", "\n", "Ünd a text of more than one chunk, and more than one window: " * 2, "x", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Model folders by preset, as `bmojo train` writes them."""
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(PRESETS):
        make_model(small_preset(name, vocab_size=256), i, torch.float32).save(root / name)
    return root


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def direct(model: BMojoLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p of the continuation and whether it is the greedy one, of one row in one call."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        log_p = model(tokens[:, :-1])[0].log_softmax(-1)[0, -len(continuation) :]
    expected = tokens[0, -len(continuation) :]
    score = log_p.gather(-1, expected[:, None]).sum()
    return float(score), bool((log_p.argmax(-1) == expected).all())


def direct_text(model: BMojoLM, text: str, max_length: int | None = None) -> float:
    """log p of a text after a line feed; windows of `max_length` tokens one after the other, as full as may be."""
    row = [LINE_FEED, *text.encode()]
    step = max_length or len(row)
    score = 0.0
    for done in range(0, len(row) - 1, step):
        end = min(done + step, len(row) - 1)
        first = max(0, end - step)
        score += direct(model, row[first : done + 1], row[done + 1 : end + 1])[0]
    return score


def greedy(model: BMojoLM, context: list[int], length: int) -> list[int]:
    with torch.no_grad():
        logits, state = model(torch.tensor([context]))
        out = []
        for _ in range(length):
            out.append(int(logits[0, -1].argmax()))
            logits, state = model(torch.tensor([out[-1:]]), state)
    return out


def greedy_text(model: BMojoLM, context: str, length: int) -> str:
    out = greedy(model, list(context.encode()), length)
    return bytes(byte for byte in out if byte).decode("utf-8", "replace")  # byte 0 pads


def close(got: float, expected: float) -> bool:
    return got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("segment", [4, 1024])
def test_loglikelihood_is_that_of_each_row_alone(folder, name, batch_size, segment, monkeypatch):
    monkeypatch.setattr(harness, "SEGMENT", segment)
    lm, model = HarnessLM(str(folder / name), batch_size=batch_size), BMojoLM.load(folder / name)
    got = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(PAIRS, got, strict=True):
        moved = len(context) - len(context.rstrip())
        before = list(context.rstrip().encode()) or [LINE_FEED]
        expected = direct(model, before, [*b" " * moved, *continuation.encode()])
        assert close(score, expected[0])
        assert is_greedy == expected[1]
    likeliest = greedy(model, [1, 2, 3], 4)
    rows = [(None, [1, 2, 3], likeliest), (None, [1, 2, 3], [0, *likeliest[1:]]), (None, [1], [2])]
    got = lm._loglikelihood_tokens(rows, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in got] == [direct(model, *row[1:])[1] for row in rows]
    assert got[0][1]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("max_length", [None, 7])
def test_rolling_loglikelihood_reads_documents_whole(folder, name, batch_size, max_length):
    lm = HarnessLM(str(folder / name), batch_size=batch_size, max_length=max_length)
    model = BMojoLM.load(folder / name)
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True)
    for text, score in zip(TEXTS, got, strict=True):
        assert close(score, direct_text(model, text, max_length))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_generation_is_greedy_decoding_of_each_row_alone(folder, name, batch_size):
    lm, model = HarnessLM(str(folder / name), batch_size=batch_size), BMojoLM.load(folder / name)
    contexts = [context for context, _ in PAIRS if context]
    asked = {"until": [], "max_gen_toks": 9, "do_sample": False}
    got = lm.generate_until(requests("generate_until", [(context, asked) for context in contexts]), disable_tqdm=True)
    assert got == [greedy_text(model, context, 9) for context in contexts]
    stop = got[0][3]
    asked = {"until": [stop], "max_gen_toks": 9}
    assert lm.generate_until(requests("generate_until", [(contexts[0], asked)])) == [got[0].split(stop)[0]]


def test_model_call_keeps_the_mask(folder):
    lm, model = HarnessLM(str(folder / "bmojo")), BMojoLM.load(folder / "bmojo")
    tokens = torch.randint(256, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    logits = lm._model_call(tokens, mask)
    torch.testing.assert_close(logits[1:, 4:], model(tokens[1:, 4:])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:1], lm._model_call(tokens[:1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        lm._model_call(tokens, mask, labels=tokens)


def test_max_length_cuts_from_the_left(folder, caplog):
    lm, model = HarnessLM(str(folder / "bmojo"), max_length=10), BMojoLM.load(folder / "bmojo")
    context, continuation = "a context of many tokens", " end"
    row = (context + continuation).encode()
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    assert close(score, direct(model, list(row[-11:-4]), list(row[-4:]))[0])
    assert "27 tokens are more than max_length=10; the first are cut off" in caplog.text
    asked = {"until": [], "max_gen_toks": 3}
    (text,) = lm.generate_until(requests("generate_until", [(context, asked)]))
    assert text == greedy_text(model, context[-7:], 3)
    with pytest.raises(DataError, match=r"between 1 and max_length \(10\) tokens, got 11"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 11)]))


def test_batch_size_auto(folder):
    one, auto = (HarnessLM(str(folder / "bmojo"), batch_size=size) for size in (1, "auto"))
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [(text,) for text in TEXTS]),
        ("generate_until", [(context, {"until": ["\n"], "max_gen_toks": 4}) for context, _ in PAIRS if context]),
    ):
        got, expected = (getattr(lm, kind)(requests(kind, arguments)) for lm in (auto, one))
        assert got == expected or torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_prefix_token(folder):
    text = requests("loglikelihood", [("", "b")])
    model = BMojoLM.load(folder / "bmojo")
    for given, prefix in ((None, LINE_FEED), (65, 65)):
        lm = HarnessLM(str(folder / "bmojo"), prefix_token_id=given)
        assert close(lm.loglikelihood(text)[0][0], direct(model, [prefix], [98])[0])


def test_folders_of_save_pretrained(tmp_path):
    model = BMojoForCausalLM(BMojoConfig.from_core(small_preset("bmojo", vocab_size=256)))
    model.save_pretrained(tmp_path)
    BMojoByteTokenizer(bos_token="\x02").save_pretrained(tmp_path)
    lm = HarnessLM(str(tmp_path), dtype="float64")
    assert lm.model.dtype == torch.float64
    assert lm.prefix_token_id == 2
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", [("", "b")]))
    assert close(score, direct(model.model.double(), [2], [98])[0])
    live = HarnessLM(model, tokenizer=lm.tokenizer)
    assert live.loglikelihood(requests("loglikelihood", [("", "b")]))[0][0] == score


def test_the_tokenizer_of_a_run(tmp_path):
    run = tmp_path / "run"
    codec = train_bpe([Document("0", "the cat and the dog and the end\n" * 20)], 270, run / "tokenizer.json")
    model = make_model(small_preset("bmojo", vocab_size=270), dtype=torch.float32)
    model.save(run / "model")
    texts = ["the cat and the", "the"]
    asked = {"until": [], "max_gen_toks": 5}
    for folder in (run, run / "model"):
        lm = HarnessLM(str(folder), batch_size=2)
        got = lm.generate_until(requests("generate_until", [(text, asked) for text in texts]))
        for text, rest in zip(texts, got, strict=True):
            tokens = codec.encode(text).tolist()
            for _ in range(5):
                tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
            assert rest == codec.decode(tokens[-5:])
        line_feed = codec.encode("\n").tolist()
        scores = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
        for text, score in zip(texts, scores, strict=True):
            assert close(score, direct(model, line_feed, codec.encode(text).tolist())[0])
    model.save(tmp_path / "a/b/c/d/model")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json of 270 tokens in .* name the tokenizer"):
        HarnessLM(str(tmp_path / "a/b/c/d/model"))
    PreTrainedTokenizerFast(tokenizer_file=str(run / "tokenizer.json")).save_pretrained(run)
    assert HarnessLM(str(tmp_path / "a/b/c/d/model"), tokenizer=str(run)).tokenizer.vocab_size == 270
    make_model(small_preset("bmojo", vocab_size=272)).save(tmp_path / "padded")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json of 272 tokens in"):
        HarnessLM(str(tmp_path / "padded"))
    shutil.copy(run / "tokenizer.json", tmp_path / "padded")
    assert HarnessLM(str(tmp_path / "padded")).tokenizer.vocab_size == 270
    make_model(small_preset("bmojo", vocab_size=256)).save(tmp_path / "bytes")
    with pytest.raises(CheckpointError, match="the tokenizer has 270 tokens, the model 256"):
        HarnessLM(str(tmp_path / "bytes"), tokenizer=str(run))


def test_wrong_folders_are_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{")
    for folder, message in (
        ("missing", "no bmojo model at .*missing: expected a folder of `bmojo train` or save_pretrained"),
        (".", "config.json is not a bmojo configuration: model_type must be 'bmojo', got 'gpt2'"),
        ("damaged", "config.json is not a bmojo configuration: the configuration is not JSON"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            HarnessLM(str(tmp_path / folder))
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "bmojo.eval.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(MissingPackageError, match=r"needs the package lm_eval: pip install 'bmojo\[eval\]'"):
        importlib.import_module("bmojo.eval.harness")


# tasks
@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A folder with a multiple choice made from a local file."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"question": "The capital of France?", "choices": [" Paris", " Rome", " a longer choice"], "answer": 0},
        {"question": "Two and two?", "choices": [" 5", " 4"], "answer": 1},
        {"question": "Is the grass green, all in all?", "choices": [" yes", " no"], "answer": 0},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "questions.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Data sets cached in a folder of the test; nltk finds its sentence splitter, which niah_single_1 never uses."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])


def accuracy(model: BMojoLM, task: Path) -> float:
    rows = [json.loads(line) for line in (task / "questions.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        scores = [direct(model, list(row["question"].encode()), list(one.encode()))[0] for one in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


@pytest.mark.slow
def test_a_local_task(folder, task, offline):
    for name in PRESETS:
        out = lm_eval.simple_evaluate(
            model="bmojo",
            model_args={"pretrained": str(folder / name)},
            tasks=["local_questions"],
            task_manager=TaskManager(include_path=str(task), include_defaults=False),
            batch_size=3,
            bootstrap_iters=0,
        )
        assert close(out["results"]["local_questions"]["acc,none"], accuracy(BMojoLM.load(folder / name), task))


@pytest.mark.slow
def test_the_command_line(folder, task, tmp_path):
    """`lm_eval` itself, in a process where nobody imports bmojo."""
    command = [Path(sys.executable).parent / "lm_eval", "--model", "bmojo", "--tasks", "local_questions"]
    command += ["--include_path", task, "--output_path", tmp_path / "out", "--batch_size", "2"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(model: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, "--model_args", f"pretrained={model}"], env=environment, capture_output=True, text=True
        )

    done = run(folder / "bmojo")
    assert done.returncode == 0, done.stderr
    assert "|local_questions|" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    got = json.loads(results.read_text())["results"]["local_questions"]["acc,none"]
    assert close(got, accuracy(BMojoLM.load(folder / "bmojo"), task))
    wrong = run(tmp_path / "missing")
    assert wrong.returncode != 0
    assert "CheckpointError: no bmojo model at" in wrong.stderr.splitlines()[-1]


@pytest.mark.slow
def test_niah_single_1(folder, offline):
    """RULER's needle in a haystack of one repeated sentence: a tiny model finds nothing, but twice the same.

    RULER keeps 128 tokens for the answer, and from 4096 on adds the 90 bytes of the sentence 25 times at once: prompts
    are shorter than their name says.
    """
    pretrained = {"pretrained": str(folder / "bmojo")}
    least = {1024: 700, 4096: 2500, 5120: 4096}  # bytes of a prompt
    manager = TaskManager(metadata={**pretrained, "max_seq_lengths": list(least)})

    def run() -> list[dict]:
        out = lm_eval.simple_evaluate(
            model="bmojo",
            model_args=pretrained,
            tasks=["niah_single_1"],
            task_manager=manager,
            samples={"niah_single_1": [0, 1, 500, 501, 1000, 1001]},  # 500 of each length
            batch_size=2,
            bootstrap_iters=0,
        )
        assert [out["results"]["niah_single_1"][f"{length},none"] for length in least] == [0, 0, 0]
        return out["samples"]["niah_single_1"]

    model, seen = BMojoLM.load(folder / "bmojo"), []
    for a, b in zip(run(), run(), strict=True):
        assert (a["doc"], a["resps"]) == (b["doc"], b["resps"])
        prompt = a["arguments"]["gen_args_0"]["arg_0"] if isinstance(a["arguments"], dict) else a["arguments"][0][0]
        length = a["doc"]["max_length"]
        assert least[length] < len(prompt.encode()) <= length
        assert a["resps"] == [[greedy_text(model, prompt, 128)]]
        seen.append(length)
    assert seen == [1024, 1024, 4096, 4096, 5120, 5120]


def test_an_lm_eval_of_another_shape_is_warned_of(monkeypatch):
    """`import torch` calls this in every process; it must not fail."""
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.delitem(sys.modules, "lm_eval.models", raising=False)
    with pytest.warns(UserWarning, match="this lm_eval can't be told of `--model bmojo`"):
        bmojo_lm_eval.register()
