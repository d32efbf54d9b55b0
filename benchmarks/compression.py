"""Bits per byte, size and speed: our models and CTW against PPMd, xz, zstd, brotli, bz2 and zlib.

    python benchmarks/compression.py split runs/compression
    bmojo train --out runs/compression/python-mamba2 --model mamba2 --text runs/compression/python --steps 800 \\
        --seq-len 512 --threads 1             # and so on: TEXT-PRESET, of both texts
    python benchmarks/compression.py measure runs/compression --out docs/results/compression

Two texts, each coded as one file: the package asyncio of Python's standard library, by models trained on the rest of it
(without tests, idlelib, lib2to3, encodings and topics of pydoc), and three of Shakespeare's plays, by models trained on
the others. What is measured once is kept, so that it can be stopped and gone on with.

Three rates: of the file alone; with the weights added, as float32 and as float16; and "primed", of the file behind the
text that the models were trained on, less that text alone: what a compressor makes of the same experience. Speeds are
per second of processor time, which other work on the machine disturbs less, all on one thread.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import shutil
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmojo import BMojoLM
from bmojo.data.fetch import fetch
from bmojo.eval.text import token_bits
from bmojo.figures import Picture, draw, make_picture, new_figure, write_pictures
from bmojo.files import optional_module, write_whole
from bmojo.tables import Cell, Column, Table, markdown
from bmojo.train.machine import machine
from bmojo.universal.byte_ctw import ByteCTW
from bmojo.universal.compress import STREAMS, LanguageModel, compress, decompress

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "__pycache__"}
HELD_OUT = {"python": ("asyncio",), "shakespeare": ("hamlet", "tempest", "winters_tale")}
OURS = {"CTW": ByteCTW(), "CTW, counts from 1/10": ByteCTW(prior=0.1), "KT (order 0)": ByteCTW(0)}
UNPRIMED = {"CTW, counts from 1/10", "KT (order 0)", "bz2 -9", "zlib -9"}  # they forget, or it takes too long
LINES = {
    "PPMd, order 6": ("#333333", "--"),
    "CTW": ("#777777", ":"),
    "xz -9e": ("#bbbbbb", "--"),
    "brotli -11": ("#999999", "-."),
}
LENGTHS, PIECES = [2**power for power in range(9, 17)], 4
Result = dict[str, Any]


def split(folder: Path) -> None:
    """FOLDER/TEXT/: what to train on; FOLDER/TEXT.test: what to compress."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    kept = [path for path in sources if not set(path.parts) & LEFT_OUT and _is_text(library / path)]
    corpus = folder / "corpus"
    plays = [path.relative_to(corpus) for path in fetch("corpus", corpus)]
    for text, root, files in (("python", library, kept), ("shakespeare", corpus, plays)):
        held = [path for path in files if path.as_posix().startswith(HELD_OUT[text])]
        for path in files:
            if path not in held:
                (folder / text / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / path, folder / text / path)
        write_whole(folder / f"{text}.test", b"".join((root / path).read_bytes() for path in held))
        print(f"{text}: {len(files) - len(held)} files to train on, {len(held)} to compress")


def _is_text(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def compressors() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """To compress and to decompress, by name."""
    ppmd, zstd, brotli = (optional_module(name, "the comparison", "dev") for name in ("pyppmd", "zstandard", "brotli"))
    model = {"max_order": 6, "mem_size": 256 << 20}
    window = zstd.ZstdCompressionParameters.from_level(19, window_log=27)
    own = {
        name: (lambda data, c=coder: compress(data, c), lambda packed, c=coder: decompress(packed, c))
        for name, coder in OURS.items()
    }
    return {
        "PPMd, order 6": (lambda data: ppmd.compress(data, **model), lambda packed: ppmd.decompress(packed, **model)),
        "xz -9e": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "zstd -19 --long": (
            zstd.ZstdCompressor(compression_params=window).compress,
            zstd.ZstdDecompressor(max_window_size=1 << 27).decompress,
        ),
        "brotli -11": (lambda data: brotli.compress(data, quality=11, lgwin=24), brotli.decompress),
        "bz2 -9": (bz2.compress, bz2.decompress),
        "zlib -9": (lambda data: zlib.compress(data, 9), zlib.decompress),
        **own,
    }


def measure(folder: Path, out: Path, streams: int) -> None:
    report = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {"cells": []}
    report |= {
        "command": f"python benchmarks/compression.py measure {folder} --out {out} --streams {streams}",
        "machine": machine(),
    }
    for text in HELD_OUT:
        data, training = (folder / f"{text}.test").read_bytes(), _joined(folder / text)
        for name, (pack, unpack) in compressors().items():
            if cell := _begun(report, text, name, len(data)):
                cell |= _timed(data, pack, unpack)
                head = len(pack(b"")) if name in OURS else 0
                cell["curve"] = [sum(len(pack(p)) - head for p in pieces(data, n)) / PIECES for n in LENGTHS]
                if name not in UNPRIMED:
                    cell["primed"] = len(pack(training + data)) - len(pack(training))
                _finish(report, cell, out)
        for run in sorted(folder.glob(f"{text}-*/train.json")):
            if cell := _begun(report, text, run.parent.name.removeprefix(f"{text}-"), len(data)):
                model = BMojoLM.load(run.parent / "model").eval()
                coder = LanguageModel(model, streams=streams)
                cell |= _timed(data, partial(compress, coder=coder), partial(decompress, coder=coder))
                cell["parameters"] = sum(parameter.numel() for parameter in model.parameters())
                whole = [np.frombuffer(piece, np.uint8) for piece in pieces(data, LENGTHS[-1])]
                bits = [bits for _, bits in token_bits(model, whole, segment=512, batch_size=PIECES)]
                cell["curve"] = [sum(piece[:n].sum() for piece in bits) / 8 / PIECES for n in LENGTHS]
                trained = json.loads(run.read_text())
                cell["training"] = trained["settings"] | {"seconds": trained["record"]["seconds"]}
                _finish(report, cell, out)
    write_pictures(out / "figures", [picture(report["cells"])])
    write_whole(out / "table.md", f"# Bits per byte\n\n{tables(report['cells'])}".encode())
    print(tables(report["cells"]))


def pieces(data: bytes, length: int) -> list[bytes]:
    """Some of that length, evenly spread."""
    return [data[start : start + length] for start in range(0, len(data) - length, len(data) // PIECES)][:PIECES]


def _joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def _begun(report: Result, text: str, name: str, size: int) -> Result | None:
    """A new cell, None if it is measured."""
    if any((cell["text"], cell["coder"]) == (text, name) for cell in report["cells"]):
        return None
    print(f"{text}: {name}", file=sys.stderr, flush=True)
    return {"text": text, "coder": name, "size": size}


def _timed(data: bytes, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Result:
    pack(data[:1000])  # what is compiled or loaded at the first call is not counted
    begin = time.process_time()
    packed = pack(data)
    middle = time.process_time()
    if unpack(packed) != data:
        raise RuntimeError("the data did not come back")
    return {"bytes": len(packed), "seconds": middle - begin, "seconds_back": time.process_time() - middle}


def _finish(report: Result, cell: Result, out: Path) -> None:
    report["cells"].append(cell)
    write_whole(out / "results.json", (json.dumps(report, indent=1) + "\n").encode())


def rate(cell: Result, size: float | None = None, bytes_a_weight: int = 0) -> float:
    """Bits per byte, as if the file were of another size, with the weights added."""
    weights = bytes_a_weight * cell.get("parameters", 0)
    return 8 * (cell["bytes"] / cell["size"] + weights / (size or cell["size"]))


def tables(cells: list[Result]) -> str:
    """A table of each text, the shortest first."""
    parts = []
    for text in HELD_OUT:
        mine = {cell["coder"]: cell for cell in sorted(cells, key=rate) if cell["text"] == text}
        columns = {
            "file": {name: rate(cell) for name, cell in mine.items()},
            "+ weights, float16": {name: rate(cell, None, 2) for name, cell in mine.items()},
            "+ weights, float32": {name: rate(cell, None, 4) for name, cell in mine.items()},
            "primed": {
                name: 8 * cell["primed"] / cell["size"] if "primed" in cell else rate(cell)
                for name, cell in mine.items()
                if "primed" in cell or "parameters" in cell
            },
            "kB/s in": {name: cell["size"] / cell["seconds"] / 1000 for name, cell in mine.items()},
            "kB/s out": {name: cell["size"] / cell["seconds_back"] / 1000 for name, cell in mine.items()},
        }
        shown = [_column(head, values, max if "kB/s" in head else min) for head, values in columns.items()]
        size = next(iter(mine.values()))["size"]
        parts.append(
            f"{text}, {size:,} bytes\n\n{markdown(Table(list(mine), shown)).replace('| model |', '| coder |')}\n"
        )
    return "\n".join(parts)


def _column(head: str, values: dict[str, float], best: Callable[..., str]) -> Column:
    form = "{:,.3f}" if best is min else "{:,.1f}"
    return Column(
        head, (head,), {name: Cell(value, form.format(value), value, value) for name, value in values.items()}, best
    )


def picture(cells: list[Result]) -> Picture:
    """Bits per byte against the length of the file."""
    figure, axes = new_figure(len(HELD_OUT))
    for axis, text in zip(axes, HELD_OUT, strict=True):
        for cell in cells:
            if cell["text"] == text and (cell["coder"] in LINES or "parameters" in cell):
                colour, style = LINES.get(cell["coder"], (None, "-"))
                line = {"linestyle": style, "markersize": 4} | ({"color": colour, "marker": "."} if colour else {})
                points = [(n, 8 * size / n) for n, size in zip(LENGTHS, cell["curve"], strict=True)]
                draw(axis, cell["coder"], points, **line)
        axis.set_title(text, fontsize=10)
        axis.set_ylabel("bits per byte")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}")
        axis.set_xlabel("KiB of the file")
    caption = f"Bits per byte of files of so many bytes, mean of {PIECES} pieces; ours without heads and weights."
    return make_picture(figure, axes, "length", caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["split", "measure"])
    parser.add_argument("folder", type=Path, help="where the texts and the models are")
    parser.add_argument("--out", type=Path, default=Path("docs/results/compression"))
    parser.add_argument("--streams", type=int, default=STREAMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "split":
        split(options.folder)
    else:
        measure(options.folder, options.out, options.streams)


if __name__ == "__main__":
    main()
