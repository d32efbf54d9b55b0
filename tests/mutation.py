"""Mutation testing of `bmojo.ops` and `bmojo.memory`: does a test fail when the code is changed in one place?

    make mutation                                   every mutant, from scratch: about an hour on one core
    .venv/bin/python tests/mutation.py --again      those that survived last time, and those of changed functions

The settings (which tests are run) are in pyproject.toml, the last results and the reasons of the surviving mutants in
docs/mutation.md. mutmut leaves decorated functions alone, and most ops are decorated. It is therefore given a copy of
the tree, in build/mutation, where `@decorator` above `def f` has become `f = decorator(f)` below it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "mutation"
PACKAGES = ("ops", "memory")


def undecorated(source: str) -> str:
    """The source with the decorators of its functions turned into assignments, which mutmut copies as they are."""
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: -node.lineno):  # from the end, so that line numbers stay true
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if not decorators or decorators == ["classmethod"]:  # this one mutmut can do
            continue
        (decorator,) = decorators
        assert node.end_lineno is not None
        if "cache" not in decorator:  # what the run before left in a cache would hide the mutant
            after = f"{node.name} = {decorator}({node.name})  # pragma: no mutate"
            lines.insert(node.end_lineno, " " * node.col_offset + after)
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def copy_tree() -> None:
    """Bring the copy up to date. A file that is the same keeps its time, and mutmut its results."""
    for path in [ROOT / "pyproject.toml", *(ROOT / "src").rglob("*"), *(ROOT / "tests").rglob("*")]:
        if not path.is_file() or "__pycache__" in path.parts or "egg-info" in path.parent.suffix:
            continue
        content, target = path.read_bytes(), TREE / path.relative_to(ROOT)
        if path.suffix == ".py" and path.parent in [ROOT / "src" / "bmojo" / package for package in PACKAGES]:
            content = undecorated(content.decode()).encode()
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def results() -> Iterator[tuple[str, str, str]]:
    """File, mutant and outcome of every mutant, the outcome as mutmut calls it."""
    for meta in sorted(TREE.glob("mutants/src/bmojo/*/*.meta")):
        for mutant, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            yield str(meta.with_suffix("").relative_to(TREE / "mutants")), mutant, status_by_exit_code[code]


def change(file: str, mutant: str) -> list[str]:
    """The lines that a mutant takes out (-) and puts in (+)."""
    path = TREE / "mutants" / file
    spans = json.loads(path.with_name(path.name + ".spans").read_text())["spans"]
    name = mutant.rpartition(".")[2]
    original = name.rpartition("_")[0] + "_orig"
    lines = path.read_text().splitlines()
    before, after = (
        [line.replace(n, "f") for line in lines[slice(spans[n][0] - 1, spans[n][1])]] for n in (original, name)
    )
    diff = difflib.unified_diff(before, after, n=0, lineterm="")
    return [f"{line[0]} {line[1:].strip()}" for line in diff if not line.startswith(("---", "+++", "@@"))]


def report() -> None:
    """Counts by file; and in survivors.txt the mutants that no test killed."""
    counts: dict[str, Counter[str]] = {}
    left = []
    for file, mutant, outcome in results():
        counts.setdefault(file.removeprefix("src/bmojo/"), Counter())[outcome] += 1
        if outcome not in ("killed", "timeout", "not checked"):
            left.append("\n    ".join([f"{mutant}  ({outcome})", *change(file, mutant)]))
    counts["all"] = sum(counts.values(), Counter())
    print("| file | mutants | tried | killed | timed out | left | killed or timed out |\n" + "| --- " * 7 + "|")
    for file, count in counts.items():
        tried = count.total() - count["not checked"]
        killed, late = count["killed"], count["timeout"]
        share = f"{(killed + late) / max(tried, 1):.1%}"
        print(f"| {file} | {count.total()} | {tried} | {killed} | {late} | {tried - killed - late} | {share} |")
    (TREE / "survivors.txt").write_text("\n".join(left) + "\n")
    print(f"\nThose left, with what was changed: {TREE.relative_to(ROOT) / 'survivors.txt'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="only what survived last time or is new")
    parser.add_argument("--report", action="store_true", help="run nothing; count the last results again")
    parser.add_argument("--workers", default="1", help="how many mutants at a time (default: 1)")
    arguments = parser.parse_args()
    if not arguments.report:
        if not arguments.again and TREE.exists():
            shutil.rmtree(TREE)
        copy_tree()
        (TREE / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which test runs which function, anew
        mutmut = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", arguments.workers]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(mutmut, cwd=TREE, env=environment, check=True)
        left = [mutant for _, mutant, outcome in results() if outcome not in ("killed", "timeout")]
        if arguments.again and left:
            subprocess.run([*mutmut, *left], cwd=TREE, env=environment, check=True)
    report()


if __name__ == "__main__":
    main()
