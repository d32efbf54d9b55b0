"""Whether all that a local store has is whole, and what to do where it isn't.

Verifying reads every entry of the log. It does so in a process of its own, for a damaged LMDB may kill the one that
reads it. Repairing does not go by the log's tables: it looks through the bytes of its file for frames, which tell by
themselves whether they are whole, and writes those of blocks that were not forgotten to a new log.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bmojo.errors import StoreError
from bmojo.memory.engines.block import MAGIC, Block, decode, frame_length, frame_session
from bmojo.memory.engines.local import (
    IDS,
    LOGS,
    SOURCE,
    Forgotten,
    Manifest,
    Source,
    State,
    block_rows,
    clean,
    lock_writer,
    read_keys,
    replace_log,
)  # fmt: skip
from bmojo.memory.engines.log import Log, Raw, Row

SHOWN = 20  # problems told
Progress = Callable[[int], None]


class Verified(NamedTuple):
    """blocks   that are whole
    problems    what is not, in words, the first ones; none: all is well
    """

    blocks: int
    problems: list[str]


class Repaired(NamedTuple):
    """blocks   that were kept
    lost        sources of which blocks are missing, and how many: read them again
    """

    blocks: int
    lost: dict[str, int]


def verify(folder: str | Path, progress: Progress = lambda blocks: None) -> Verified:
    """Read all of a store. `progress` is told how many blocks were read, now and then. Raises StoreError for a folder
    that is no store, or one whose meta.json is damaged."""
    manifest = Manifest.read(Path(folder))
    command = [sys.executable, "-c", f"from {__name__} import main; main()", str(folder)]
    blocks, problems, ended = 0, [], False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        for line in reader.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "problem":
                problems.append(rest)
            else:
                blocks, ended = int(rest), word == "end"
                progress(blocks)
    if not ended:
        problems.append(f"{Path(folder) / str(manifest.log)} is damaged: reading it ends its process")
    return Verified(blocks, problems)


def main() -> None:
    folder = Path(sys.argv[1])
    blocks = shown = 0
    for problem in _problems(folder):
        if problem is None:
            blocks += 1
            if blocks % 1000 == 0:
                print("read", blocks, flush=True)
        elif (shown := shown + 1) <= SHOWN:
            print("problem", " ".join(problem.split()), flush=True)
    if shown > SHOWN:
        print("problem", f"and {shown - SHOWN} more")
    print("end", blocks)


def _problems(folder: Path) -> Iterator[str | None]:
    """None for each block that is whole, a text for each thing that isn't."""
    try:
        manifest = Manifest.read(folder)
        log = manifest.open_log(folder)
        state = State.read(log)
        keys_of: dict[int, int] = {}
        for number, value in log.scan("keys"):
            if number % 2**IDS >= state.next:
                continue  # is being written
            try:
                keys_of[number] = hash(read_keys(value, state.dim)[1].tobytes())
            except (StoreError, ValueError) as error:
                yield f"{log.path}: block {number % 2**IDS}: {error}"
        for number, value in log.scan("frames", last=state.next - 1):
            try:
                block = decode(value)
                keys = keys_of.pop(block.layer << IDS | number, None)
                if block.id != number or keys != hash(block.keys.astype("<f2").tobytes()):
                    raise StoreError("it is not found by its keys")
            except (StoreError, ValueError) as error:
                yield f"{log.path}: block {number}: {error}"
            else:
                yield None
        for number in keys_of:
            yield f"{log.path}: block {number % 2**IDS} is missing"
        for _, value in log.scan("sources"):
            try:
                Source.read(value)
            except (StoreError, ValueError) as error:
                yield f"{log.path}: a source: {error}"
    except StoreError as error:
        yield str(error)


def repair(folder: str | Path, progress: Progress = lambda blocks: None) -> Repaired:
    """Make a new log of what is whole in the old one, less what was forgotten. Raises StoreError if it can't."""
    folder = Path(folder)
    with lock_writer(folder):
        manifest = Manifest.read(folder)
        repaired = Repaired(0, {})
        if manifest.log is not None:
            with LOGS[manifest.engine].raw(folder / manifest.log) as file:
                rows, state, repaired = _salvage(file, LOGS[manifest.engine], manifest.forgotten, progress)
                replace_log(folder, manifest, rows, state, repaired=True)
        clean(folder)
    return repaired


class _Piece(NamedTuple):
    at: int
    length: int
    order: tuple[int, int]  # of two with one number the later is valid


def _salvage(
    file: Raw, log: type[Log], forgotten: tuple[Forgotten, ...], progress: Progress
) -> tuple[Iterator[Row], State, Repaired]:
    gone, hidden = {entry.number for entry in forgotten}, {entry.source: entry.upto for entry in forgotten}
    pieces: dict[int, _Piece] = {}
    found: dict[int, tuple[_Piece, Source]] = {}
    owner: dict[int, str] = {}
    session = dim = 0
    for piece, content in _frames(file, log):
        session = max(session, piece.order[0])
        if isinstance(content, Source):
            if content.number not in found or found[content.number][0].order <= piece.order:
                found[content.number] = piece, content
        elif content.id > hidden.get(content.source, -1) and (
            content.id not in pieces or pieces[content.id].order <= piece.order
        ):
            pieces[content.id], owner[content.id], dim = piece, content.source, content.keys.shape[1]
            if len(pieces) % 1000 == 0:
                progress(len(pieces))
    session += 1
    records = {record.source: record for number, (_, record) in found.items() if number not in gone}
    sources = max([*found, *gone], default=-1) + 1
    next_id = max([*pieces, *hidden.values(), *(record.last for _, record in found.values())], default=-1) + 1
    for source in owner.values():
        if source not in records:
            records[source] = Source(sources, source)
            sources += 1
    left = Counter(owner.values())
    lost = {name: n for name, record in records.items() if (n := record.blocks - left[name]) > 0}

    def rows() -> Iterator[Row]:
        tokens: Counter[str] = Counter()
        for _, piece in sorted(pieces.items()):
            block = decode(log.pieces(file, piece.at, piece.length))
            tokens[block.source] += len(block.tokens)
            yield from block_rows(block, records[block.source].number, session)
        for name, record in records.items():
            facts = {} if name in lost else record.facts  # such as that all of it was read
            yield record._replace(blocks=left[name], tokens=tokens[name], facts=facts).row(session)

    return rows(), State(next_id, session, sources, dim), Repaired(len(pieces), lost)


def _frames(file: Raw, log: type[Log]) -> Iterator[tuple[_Piece, Block | Source]]:
    """All whole frames in the bytes of a log, those of entries that were replaced among them."""
    at = file.find(MAGIC[:3])
    while at >= 0:
        head = file[at : at + 16]
        for magic in (MAGIC, SOURCE):
            length = frame_length(head, magic=magic)
            if length is not None and length <= len(file):
                try:
                    data = log.pieces(file, at, length)
                    content = Source.read(data) if magic == SOURCE else decode(data)
                except StoreError:
                    continue
                order = frame_session(data), content.version if isinstance(content, Source) else 0
                yield _Piece(at, length, order), content
        at = file.find(MAGIC[:3], at + 1)
