import os
import subprocess
import sys

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
