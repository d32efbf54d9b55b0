import os
import subprocess
import sys
import warnings

import pytest

from bmojo import BMojoLM, Stream
from bmojo.data import ByteTokenizer

PROGRAM = "import sys, bmojo.cli; sys.exit(bmojo.cli.main())"


def test_prints_what_the_library_generates(run_folder, bmojo, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße")
    more = ["--max-new-tokens", 30, "--temperature", 0.7, "--top-p", 0.9, "--top-k", 50, "--seed", 3]
    model, codec = BMojoLM.load(run_folder / "model"), ByteTokenizer()
    stream = Stream(model, temperature=0.7, top_p=0.9, top_k=50, seed=3).feed("Grüße")
    text = codec.decode(list(stream.generate(30)))
    assert bmojo("generate", run_folder, "--prompt", "Grüße", *more) == (0, text, "")
    assert bmojo("generate", run_folder / "model", "--prompt-file", tmp_path / "prompt.txt", *more) == (0, text, "")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_another_process_goes_on_from_the_state(run_folder, bmojo, tmp_path, temperature):
    def command(*more):
        return ["generate", str(run_folder), "--temperature", str(temperature), "--threads", "1", *map(str, more)]

    state = tmp_path / "state.safetensors"
    _, whole, _ = bmojo(*command("--prompt", "Document", "--max-new-tokens", 40))
    _, first, _ = bmojo(*command("--prompt", "Document", "--max-new-tokens", 15, "--state", state))
    go_on = command("--resume-state", state, "--max-new-tokens", 25)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *go_on], capture_output=True, check=True, env=environment)
    assert shown(first + done.stdout.decode()) == shown(whole)


def shown(text):
    """Without the signs for bytes that are no character: these differ where a character is cut in two."""
    return text.replace("\ufffd", "")


def test_refuses(run_folder, refused, tmp_path):
    assert "give --prompt or --prompt-file" in refused("generate", run_folder)
    assert "give one" in refused("generate", run_folder, "--prompt", "a", "--prompt-file", "b")
    assert "missing.txt: No such file" in refused("generate", run_folder, "--prompt-file", tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    assert "byte 3 is not valid UTF-8" in refused("generate", run_folder, "--prompt-file", tmp_path / "latin.txt")
    assert "temperature must be" in refused("generate", run_folder, "--prompt", "a", "--temperature", "-1")
    assert "no memory state at" in refused("generate", run_folder, "--resume-state", tmp_path / "missing")
    (tmp_path / "junk").write_text("junk")
    assert "can't be read as a memory state" in refused("generate", run_folder, "--resume-state", tmp_path / "junk")
    BMojoLM(BMojoLM.load(run_folder / "model").config.replace(eidetic_slots=3)).empty_state().save(tmp_path / "other")
    assert "belongs to another model" in refused("generate", run_folder, "--resume-state", tmp_path / "other")
    assert "can't write --state" in refused("generate", run_folder, "--prompt", "a", "--state", tmp_path / "junk/state")
    assert "--state takes a file, got the folder" in refused(
        "generate", run_folder, "--prompt", "a", "--state", tmp_path
    )


def test_no_new_tokens_read_the_prompt(run_folder, bmojo, refused, tmp_path):
    state, more = tmp_path / "new/state", ["--temperature", 0, "--max-new-tokens"]
    whole = bmojo("generate", run_folder, "--prompt", "Document", *more, 10)[1]
    assert bmojo("generate", run_folder, "--prompt", "Docu", *more, 0, "--state", state) == (0, "", "")
    assert bmojo("generate", run_folder, "--resume-state", state, "--prompt", "ment", *more, 10)[1] == whole
    BMojoLM.load(run_folder / "model").empty_state().save(state)
    assert "nothing to go on from: give --prompt" in refused("generate", run_folder, "--resume-state", state)
    assert bmojo("generate", run_folder, "--resume-state", state, "--prompt", "Document", *more, 10)[1] == whole


def test_a_stream_goes_on_from_run_to_run(run_folder, bmojo, tmp_path):
    more = ["--temperature", 0.9, "--seed", 3, "--max-new-tokens"]
    model = BMojoLM.load(run_folder / "model").eval()
    stream = Stream(model, temperature=0.9, seed=3)
    for prompt in ("Document", " tells", ""):
        text = "".join(stream.feed(prompt).text(20))
        run = bmojo("generate", run_folder, "--stream", "mine", "--prompt", prompt, *more, 20)
        assert run == (0, text, "")
    kept = run_folder / "model/streams"
    assert sorted(path.name for path in kept.iterdir()) == [".mine.lock", "mine.safetensors"]
    first = bmojo(
        "generate", run_folder, "--stream", "mine", "--streams-dir", tmp_path, "--prompt", "Document", *more, 20
    )
    assert first[1] == "".join(Stream(model, temperature=0.9, seed=3).feed("Document").text(20))


def test_refuses_streams(run_folder, refused, tmp_path):
    assert "takes a name of letters" in refused("generate", run_folder, "--prompt", "a", "--stream", "../mine")
    assert "leave out --state" in refused("generate", run_folder, "--prompt", "a", "--stream", "b", "--state", "c")
    assert "name the stream" in refused("generate", run_folder, "--prompt", "a", "--streams-dir", tmp_path)
    assert "give --prompt or --prompt-file" in refused(
        "generate", run_folder, "--stream", "new", "--streams-dir", tmp_path / "new"
    )
    assert not (tmp_path / "new/new.safetensors").exists()
    (tmp_path / "junk.safetensors").write_text("junk")
    message = refused("generate", run_folder, "--stream", "junk", "--streams-dir", tmp_path)
    assert "junk.safetensors can't be read as a memory state" in message
    (tmp_path / "file").write_text("")
    message = refused("generate", run_folder, "--prompt", "a", "--stream", "a", "--streams-dir", tmp_path / "file")
    assert "file" in message


def test_temperature_0_tells_what_it_ignores(run_folder, bmojo):
    warnings.simplefilter("default")
    _, _, said = bmojo("generate", run_folder, "--prompt", "a", "--temperature", 0, "--top-k", 3, "--max-new-tokens", 1)
    assert said == "bmojo: warning: ignored: top_k; temperature 0 takes the most likely token\n"


def test_what_was_shown_before_ctrl_c_is_kept(run_folder, bmojo, tmp_path, monkeypatch):
    command = ["generate", run_folder, "--stream", "mine", "--streams-dir", tmp_path, "--max-new-tokens"]
    whole = shown(bmojo("generate", run_folder, "--prompt", "Document", "--max-new-tokens", 40)[1])
    given = Stream.text

    def interrupted(stream, count):
        yield from given(stream, 15)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "text", interrupted)
        code, first, _ = bmojo(*command, 40, "--prompt", "Document")
    assert code == 130
    assert shown(first + bmojo(*command, 25)[1]) == whole


@pytest.mark.slow
def test_one_process_at_a_time_and_what_a_killed_one_leaves(run_folder, bmojo, refused, tmp_path):
    command = ["generate", str(run_folder), "--stream", "mine", "--streams-dir", str(tmp_path), "--threads", "1"]
    assert bmojo(*command, "--prompt", "Document", "--max-new-tokens", 15)[0] == 0
    file = tmp_path / "mine.safetensors"
    before = file.read_bytes()
    long = [*command, "--prompt", " one", "--max-new-tokens", "1000000"]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *long], stdout=subprocess.PIPE) as child:
        assert child.stdout.read(1)  # in the middle of generation
        assert "the stream 'mine' in" in (said := refused(*command, "--prompt", "two"))
        assert "is in use by another process" in said
        child.kill()
    assert file.read_bytes() == before
    (tmp_path / ".mine.safetensors.abc").write_bytes(before[:99])  # had it been killed while it wrote
    code, text, _ = bmojo(*command, "--prompt", " one", "--max-new-tokens", 10)
    assert (code, len(text) > 0, file.read_bytes() == before) == (0, True, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.lock", "mine.safetensors"]
