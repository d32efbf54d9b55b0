"""Every command of docs/eval.md runs."""

import re
import shlex
from pathlib import Path

DOCS = (Path(__file__).parents[2] / "docs/eval.md").read_text(encoding="utf-8")


def test_the_commands_run(run_folder, bmojo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```bash\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        _, *arguments = shlex.split(line.replace("FOLDER", str(run_folder)))
        rows = () if arguments[1] == str(run_folder) else ("--rows", 2)
        assert bmojo(*arguments, *rows)[::2] == (0, ""), line
    assert (tmp_path / "needle.png").is_file()
