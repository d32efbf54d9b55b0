"""The command line: one file a verb. Nothing heavy is imported before a verb needs it.

What the user can mend is one line on stderr and exit code 2; anything else is a traceback, and a bug of ours.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import typer

from bmojo import __version__
from bmojo.errors import BMojoError, nearest


class Verb(NamedTuple):
    """A command: the function of its name's last word in `module`, loaded when it is called."""

    module: str
    help: str
    resumes: bool = False  # after an interrupt the same command goes on

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), name.split()[-1])


VERBS = {
    "compare": Verb("bmojo.cli.compare", "Train and compare models on equal terms, and write a report.", resumes=True),
    "bench": Verb("bmojo.cli.bench", "Time ops and models beside other libraries' in one run.", resumes=True),
    "bench report": Verb("bmojo.cli.bench", "Tables and figures of what `bmojo bench` measured."),
    "info": Verb("bmojo.cli.info", "Parameters, FLOPs and state bytes of a configuration."),
    "train": Verb("bmojo.cli.train", "Train a model on text.", resumes=True),
    "eval": Verb("bmojo.cli.eval", "Bits per byte of a trained model on text."),
    "eval recall": Verb("bmojo.cli.eval_recall", "Recall of key-value pairs by distance, number, length and filler."),
    "eval mad": Verb("bmojo.cli.eval_mad", "A task of MAD at baseline and harder settings."),
    "eval needle": Verb("bmojo.cli.eval_needle", "A fact hidden in real text, by length and depth."),
    "eval length": Verb("bmojo.cli.eval_length", "What a model still does on texts longer than it was trained on."),
    "diagnose": Verb("bmojo.cli.diagnose", "Are a trained model's errors white, or which memory does it lack?"),
    "sweep": Verb("bmojo.cli.sweep", "Train models over a grid of settings on a synthetic task.", resumes=True),
    "generate": Verb("bmojo.cli.generate", "Text from a trained model, as it is made."),
    "remember": Verb("bmojo.cli.remember", "Text into a store, for a model to find again.", resumes=True),
    "store stats": Verb("bmojo.cli.store", "What is in a store of blocks."),
    "store compact": Verb("bmojo.cli.store", "Erase what was forgotten from a store's files.", resumes=True),
    "store verify": Verb("bmojo.cli.store", "Read all of a store; repair what is damaged."),
    "store export": Verb("bmojo.cli.store", "The tokens of a store's blocks, with source and position, as JSON lines."),
    "store forget": Verb("bmojo.cli.store", "Hide all that a store has of a source."),
    "universal table": Verb("bmojo.cli.universal", "Solomonoff's mixture on short strings, as a table.", resumes=True),
    "universal search": Verb("bmojo.cli.universal", "The first program that prints the data, by Levin's search."),
    "universal plot": Verb("bmojo.cli.universal", "A table of Solomonoff's mixture as a figure."),
    "universal gap": Verb("bmojo.cli.universal", "How far a model's prediction in context is from Solomonoff's."),
    "texture fit": Verb("bmojo.cli.texture", "A moving scene (fire, water, leaves) as a linear system."),
    "texture synthesize": Verb("bmojo.cli.texture", "New frames of such a scene: as fast, slower, faster, backwards."),
    "convert": Verb("bmojo.cli.convert", "Models of Llama, Mistral, Qwen, Mamba-2 and others in, and back out."),
    "lower": Verb("bmojo.cli.lower", "A training or decode step as a program for XLA (Trainium)."),
    "compress": Verb("bmojo.cli.compress", "A file in as few bytes as a model finds it probable."),
    "decompress": Verb("bmojo.cli.compress", "The file that `bmojo compress` read, bit for bit."),
    "export": Verb("bmojo.cli.export", "A sharded checkpoint (FSDP) as a model folder."),
}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process') and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if (words := " ".join(arguments[:2])) in VERBS:  # a folder of that name is ./recall
        arguments[:2] = [words]
    name = arguments[0]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if not name.startswith("-") and name not in VERBS:
                raise BMojoError(f"unknown command {name!r}; {nearest(name, VERBS)}")
            command = typer.main.get_command(_app(name))
            code = command.main(arguments, prog_name="bmojo", standalone_mode=False) or 0
            sys.stdout.flush()
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except BrokenPipeError:  # who read stdout has gone, and Python flushes it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BMojoError as error:
            return _fail(str(error))
        except OSError as error:
            if error.filename is None and error.strerror is None:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            return _fail(f"{where}{error.strerror}; check the path and the space left on the disk")
        except Exception as error:
            explain = getattr(error, "format_message", None)  # usage errors of typer, or of click in older ones
            if explain is None:
                raise
            return _fail(f"{explain()} See: bmojo {name} --help")
    if code == INTERRUPTED:
        resumes = name in VERBS and VERBS[name].resumes
        print("bmojo: stopped" + ("; run the same command again to go on" if resumes else ""), file=sys.stderr)
    return code


def _app(chosen: str) -> typer.Typer:
    """All verbs, of which only the chosen one is loaded."""
    app = typer.Typer(
        name="bmojo",
        help="B'MOJO: sequence models that read four memories.",
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def version(show: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if show:
            print(__version__)

    for name, verb in VERBS.items():
        app.command(name, help=verb.help)(verb.function(name) if name == chosen else _unloaded)
    return app


def _unloaded() -> None: ...


def _fail(message: str) -> int:
    print(f"bmojo: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"bmojo: warning: {message}", file=sys.stderr)
