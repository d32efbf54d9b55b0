"""A made-up record of a run of `bmojo bench`."""


def made_entry(name, seconds, ours=None, tokens=1024, **more):
    def around(value):
        return {"median": value, "low_quartile": 0.9 * value, "high_quartile": 1.1 * value}

    entry = {"name": name, "rival": False, "tokens": tokens, "seconds": around(seconds)}
    entry |= {"tokens_per_second": tokens / seconds, "peak_memory_bytes": 2**20, "floor_share": 0.25}
    return entry | ({} if ours is None else {"ratio": around(seconds / ours)}) | more


def made_cell(suite, case, x, entries, axis="time", absent=None, changes=None, **settings):
    settings = {"pass": "forward + backward", axis: x, "batch": 1, "size": "tiny", "dtype": "float32", **settings}
    cell = {"suite": suite, "case": case, "settings": {**settings, "set": changes or {}}, "load": 0.5}
    cell["rates"] = {"flops": 1e11, "bytes": 1e10}
    if suite == "stream":
        return cell | {"stream": entries}
    return cell | {"rounds": 3, "entries": entries, "absent": absent or {}}


def made_results(cells, device="cpu"):
    machine = {"cpu": "Example", "cores": 2, "threads": 2, "torch": "2.13.0", "device": device}
    return {
        "version": 1, "created": "2026-01-31T12:00:00+00:00", "command": "bmojo bench", "bmojo": "0.1.0",
        "machine": machine, "packages": {"transformers": "5.23.0", "mambapy": None}, "cells": cells,
    }  # fmt: skip
