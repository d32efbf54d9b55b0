import subprocess
import sys
import types

import pytest

from bmojo import __version__, cli


def test_help_lists_the_verbs_and_imports_nothing_heavy():
    code = (
        "import sys, bmojo.cli; code = bmojo.cli.main(['--help']); "
        "assert bmojo.cli.main(['info', '--size', 'tiny']) == 0; "
        "heavy = {'torch', 'numpy', 'transformers', 'bmojo.compare'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, verb in cli.VERBS.items():
        assert name in done.stdout
        assert verb.help in " ".join(done.stdout.replace("│", " ").split())


def test_version_and_bare_help(bmojo):
    assert bmojo("--version") == (0, f"{__version__}\n", "")
    assert "Usage: bmojo" in bmojo()[1]


@pytest.mark.parametrize("verb", ["info", "train", "eval", "generate"])
def test_every_verb_has_help(bmojo, verb):
    code, out, _ = bmojo(verb, "--help")
    assert code == 0
    assert f"Usage: bmojo {verb}" in out


def test_an_unknown_verb_or_option_offers_the_nearest(refused):
    assert "unknown command 'trian'; did you mean 'train'?" in refused("trian")
    line = refused("info", "--sixe", "tiny")
    assert "--sixe" in line
    assert "--size" in line
    assert "--out" in refused("train")
    assert "See: bmojo train --help" in refused("train", "--out", "x", "--steps", "many")


def verb_that(monkeypatch, error):
    def broken():
        raise error

    monkeypatch.setitem(cli.VERBS, "broken", cli.Verb("broken_verb", "Breaks.", resumes=True))
    monkeypatch.setitem(sys.modules, "broken_verb", types.SimpleNamespace(broken=broken))


def test_an_interrupt_is_one_line_that_says_how_to_go_on(monkeypatch, bmojo):
    verb_that(monkeypatch, KeyboardInterrupt())
    assert bmojo("broken") == (130, "", "bmojo: stopped; run the same command again to go on\n")


def test_what_the_system_refuses_is_one_line(monkeypatch, refused):
    verb_that(monkeypatch, PermissionError(13, "Permission denied", "a/b"))
    assert "a/b: Permission denied" in refused("broken")


def test_a_bug_is_a_traceback(monkeypatch, bmojo):
    verb_that(monkeypatch, KeyError("bug"))
    with pytest.raises(KeyError, match="bug"):
        bmojo("broken")


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -c 'import sys, bmojo.cli; sys.exit(bmojo.cli.main())' info --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{", "")
