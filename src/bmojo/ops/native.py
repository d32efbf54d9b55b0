"""C++ kernels, compiled at first use by the compiler of the machine, once for it, and kept in torch's cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("bmojo.ops")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-fPIC")
TIME_LIMIT = 600  # seconds for a compiler
_failed: dict[str, str] = {}  # what was said of sources that could not be compiled


def load_ops(source: str) -> None:
    """Register the ops of a C++ file beside this module, which is compiled if this machine has not done so before.

    The library lies in the folder of torch's extensions ($TORCH_EXTENSIONS_DIR, or torch's cache) under a name that
    tells all that it depends on: source, flags, torch and processor. It is built in a folder of its own and moved there
    whole, so that a build that was killed leaves nothing that a later one would wait for or load. Of several processes
    one builds and the others wait. The compiler is $CXX, or c++.
    Raises ImportError if it can't be built or loaded; once that is so, it is not tried again.
    """
    if source in _failed:
        raise ImportError(_failed[source])
    path = Path(__file__).with_name(source)
    try:
        from torch.utils.cpp_extension import get_default_build_root

        cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "bmojo"
        cache.mkdir(parents=True, exist_ok=True)
        target = cache / f"{path.stem}-{_digest(path)}.so"
        if not target.is_file():
            _build_once(path, target)
        torch.ops.load_library(target)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _failed[source] = f"{source} can't be compiled here ({said.strip()[:400]})"
        raise ImportError(_failed[source]) from error


def differentiable_once(op: str) -> None:
    """The gradients that the op `op` gives can't be differentiated: say so, rather than take them for constants."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"gradients of {op} are not to be had; inside use_backend('chunked') they are")

    torch.library.register_autograd(f"bmojo::{op}", refuse, setup_context=lambda ctx, inputs, output: None)


def _digest(path: Path) -> str:
    """Of all that the library depends on; -march=native binds it to the instructions that the processor has."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = (file.read_text(encoding="utf-8") for file in (path, *sorted(path.parent.glob("*.h"))))
    parts = (*sources, *FLAGS, torch.__version__, platform.machine(), instructions)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build_once(path: Path, target: Path) -> None:
    import fcntl  # not on Windows

    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when its holder ends, however it ends
        if not target.is_file():
            _log.warning("compiling %s for this machine, once; it takes some seconds", path.name)
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                _compile(path, Path(work) / target.name)
                os.replace(Path(work) / target.name, target)


def _compile(path: Path, library: Path) -> None:
    from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

    compiler, unlinked = shlex.split(get_cxx_compiler()), library.with_suffix(".o")
    include = [f"-I{folder}" for folder in include_paths("cpu")]
    link = [f"-L{folder}" for folder in library_paths("cpu")]
    # linked without -fopenmp: the OpenMP that torch has loaded, and set the threads of, is the one to use
    for command in (
        [*compiler, *FLAGS, *include, "-c", str(path), "-o", str(unlinked)],
        [*compiler, "-shared", str(unlinked), *link, "-ltorch_cpu", "-lc10", "-o", str(library)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT)
