import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bmojo import presets
from bmojo.nn.model import BMojoLM
from bmojo.universal import SolomonoffTable


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "small.npz"
    SolomonoffTable.build("bp7", 6, 7).save(path)
    return path


def test_table(bmojo, refused, tmp_path):
    path = tmp_path / "table.npz"
    arguments = ("universal", "table", "--bits", 6, "--depth", 6, "--out", path)
    code, out, err = bmojo(*arguments)
    assert (code, err) == (0, "")
    assert "all      117,649 = 7^6" in out
    assert "entropy" in out
    assert "1: 2/2" in out
    assert list(tmp_path.iterdir()) == [path]  # the checkpoint is gone
    code, out, _ = bmojo(*arguments, "--json")  # there already
    facts = json.loads(out)
    assert code == 0
    assert sum(facts["mass"].values()) == facts["total"] == 7**6
    assert facts["coverage"][1] == 2
    assert "of other settings: depth 6 there, 7 asked for" in refused(*arguments[:-3], 7, "--out", path)
    assert "must be from 1 to 22, got 40" in refused(*arguments[:-3], 40, "--out", tmp_path / "other.npz")
    assert "is a folder; name the file" in refused(*arguments[:-2], "--out", tmp_path)
    assert "unknown machine 'bp1'" in refused("universal", "table", "--machine", "bp1", "--out", path)


def test_search(bmojo, refused):
    code, out, _ = bmojo("universal", "search", "0101", "--machine", "bp6")
    assert code == 0
    assert "program  .+.+.+." in out or "program  +[+.+.]" in out
    assert "Kt" in out
    code, out, _ = bmojo("universal", "search", "01101", "--max-phase", 9)
    assert code == 1
    assert out.startswith("not found: every program of bp7 that prints 01101 has Kt above 9 bits")
    code, out, _ = bmojo("universal", "search", "1", "--json")
    assert {"program": "+.", "length": 2, "steps": 2}.items() <= json.loads(out).items()
    assert "must be of bits" in refused("universal", "search", "012")


def test_plot(bmojo, refused, small, tmp_path):
    other = tmp_path / "other.npz"
    SolomonoffTable.build("bp7", 6, 5).save(other)
    for tables in ([small], [small, other]):
        out = tmp_path / f"{len(tables)}.png"
        code, printed, err = bmojo("universal", "plot", *tables, "--out", out)
        assert (code, printed.strip(), err) == (0, str(out), "")
        assert out.read_bytes().startswith(b"\x89PNG")
    for settings, told in (
        (("bp7", 5, 5), "differ in depth alone, got n_bits 5 and 6"),
        (("bp6", 6, 5), "got identity 'bp6 +><[]. on 32 cells' and 'bp7"),
        (("bp7", 6, 5, 9), "got steps 9 and 1024"),
        (("bp7", 6, 7), "must differ in depth, got [7, 7]"),
    ):
        SolomonoffTable.build(*settings).save(other)
        assert told in refused("universal", "plot", small, other, "--out", tmp_path / "no.png")
    (tmp_path / "text.npz").write_text("no table")
    assert "is no table of bmojo" in refused("universal", "plot", tmp_path / "text.npz", "--out", tmp_path / "no.png")
    assert "No such file" in refused("universal", "plot", tmp_path / "none.npz", "--out", tmp_path / "no.png")


def test_gap(bmojo, refused, small, tmp_path):
    gaps = {}
    for name in ("uniform", "kt", "ctw"):
        code, out, _ = bmojo("universal", "gap", "--table", small, "--predictor", name, "--json")
        assert code == 0
        gaps[name] = json.loads(out)["gap"]
    assert gaps["uniform"] == pytest.approx(6 - SolomonoffTable.load(small).entropy())
    assert gaps["uniform"] > gaps["kt"] > gaps["ctw"] > 0
    assert "gap      " in bmojo("universal", "gap", "--table", small, "--predictor", "kt")[1]
    assert "give a model or --predictor" in refused("universal", "gap", "--table", small)
    assert "unknown predictor 'ppm'" in refused("universal", "gap", "--table", small, "--predictor", "ppm")
    assert "no checkpoint at" in refused("universal", "gap", tmp_path / "model", "--table", small)


def test_gap_of_a_model(bmojo, refused, small, tmp_path):
    for vocab_size in (3, 4):
        config = presets.get("bmojo", "tiny", vocab_size=vocab_size, num_layers=1)
        BMojoLM(config).save(tmp_path / str(vocab_size))
    code, out, _ = bmojo("universal", "gap", tmp_path / "3", "--table", small)
    assert code == 0
    assert "the table itself needs" in out
    assert "has a vocabulary of 4" in refused("universal", "gap", tmp_path / "4", "--table", small)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_table_goes_on(tmp_path, stop, bmojo):
    path, part = tmp_path / "table.npz", tmp_path / "table.npz.part"
    arguments = ["universal", "table", "--bits", "16", "--depth", "11", "--out", str(path)]
    with subprocess.Popen([sys.executable, "-m", "bmojo", *arguments], stderr=subprocess.PIPE, text=True) as process:
        while not part.exists() and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, stop)
        _, told = process.communicate()
    assert process.returncode == (130 if stop == signal.SIGINT else -9)
    assert stop == signal.SIGKILL or told.endswith("run the same command again to go on\n")
    assert not path.exists()
    assert part.exists()
    code, out, _ = bmojo(*arguments)
    assert code == 0
    assert "8: 212/256  10: 343/1,024" in out
