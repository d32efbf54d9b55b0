"""What must hold, as a table: each bar is a bound on ratios of some cells (or on the growth in a stream)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Results = dict[str, Any]
TRAIN = {"pass": "forward + backward"}
H100 = {"size": "370m", "dtype": "bfloat16"}


@dataclass(frozen=True)
class Bar:
    """Of the cells of a case that have `settings`, with the presets as they are, at every value of setting `axis` in
    `at`, the ratios of `names` are at least (or at most) `bound`. No names: it is the growth in bytes. `device` is part
    of the device's name."""

    what: str
    suite: str
    case: str
    names: tuple[str, ...]
    axis: str
    at: tuple[int, ...]
    bound: float
    at_least: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True)
class Verdict:
    """`measured`: the worst value, None if there is none; `missing`: values of the axis that were not measured."""

    bar: Bar
    measured: float | None
    where: str
    missing: tuple[int, ...]

    @property
    def held(self) -> bool | None:
        """None: not measured, or held as far as measured."""
        if self.measured is None:
            return None
        good = self.measured >= self.bar.bound if self.bar.at_least else self.measured <= self.bar.bound
        return (None if self.missing else True) if good else False

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not measured"
        left = f" (not measured at {', '.join(f'{x:,}' for x in self.missing)})" if self.missing else ""
        return ("**not held**" if self.held is False else "held") + left


LONG = (512, 1024, 2048, 4096)
CPU = {"dtype": "float32"}
BARS = (
    Bar("`s6` over mambapy and `associative_scan`, N=16", "ops", "s6",
        ("mambapy", "associative_scan", "associative_scan compiled"), "time", (1024,), 8, settings=CPU | TRAIN),
    Bar("`mamba2` over Transformers' Mamba-2", "train", "mamba2", ("transformers",), "time", LONG, 1.5, settings=CPU),
    Bar("`gdn` layer over Qwen3-Next's", "layers", "gdn", ("transformers",), "time", LONG, 1.5, settings=CPU | TRAIN),
    Bar("`transformer` over Transformers' Llama", "train", "transformer", ("transformers",), "time", LONG, 1.0,
        settings=CPU),
    Bar("`bmojo` over `mamba2`, training", "train", "family", ("mamba2",), "time", (*LONG, 8192), 0.6, settings=CPU),
    Bar("`bmojo` over `transformer`, training", "train", "family", ("transformer",), "time", (2048, 4096, 8192), 1.0,
        settings=CPU),
    Bar("training time of `bmojo` at 4 times the length", "train", "growth", ("8,192 tokens",), "time", (2048,), 4.6,
        at_least=False, settings=CPU),
    Bar("decode time of `bmojo` at context 128K to 1K", "decode", "growth", ("context 131,072",), "longer", (131072,),
        1.05, at_least=False, settings=CPU | {"context": 1024}),
    Bar("`bmojo` over `transformer`, decoding", "decode", "family", ("transformer",), "context", (8192,), 2,
        settings=CPU),
    Bar("growth in bytes over a stream", "stream", "bmojo", (), "tokens", (1_000_000,), 50e6, at_least=False),
    Bar("370m, bf16: `bmojo` over `transformer`, training", "train", "family", ("transformer",), "time", (2048,), 1.1,
        settings=H100, device="H100"),
    Bar("370m, bf16: `bmojo` over `transformer`, training", "train", "family", ("transformer",), "time", (16384,), 2,
        settings=H100, device="H100"),
    Bar("370m, bf16: window and ssd run apart over `bmojo`'s layer", "layers", "bmojo", ("window and ssd apart",),
        "time", (2048,), 1 / 1.3, settings=H100 | TRAIN, device="H100"),
    Bar("370m, bf16: decode time of `bmojo` at context 1M to 1K", "decode", "growth", ("context 1,048,576",), "longer",
        (1_048_576,), 1.05, at_least=False, settings=H100 | {"context": 1024}, device="H100"),
)  # fmt: skip


def judge(bar: Bar, runs: Sequence[Results]) -> Verdict:
    """The bar by all results of its device."""
    seen = list(_values(bar, runs))
    missing = tuple(x for x in bar.at if x not in {x for x, _, _ in seen})
    if not seen:
        return Verdict(bar, None, "", missing)
    pick = min if bar.at_least else max
    x, value, name = pick(seen, key=lambda one: one[1])
    return Verdict(bar, value, f"{name} at {bar.axis} {x:,}" if name else "", missing)


def _values(bar: Bar, runs: Sequence[Results]) -> Iterator[tuple[int, float, str]]:
    """(value of the axis, ratio or bytes, whose)."""
    for results in runs:
        if bar.device not in results["machine"]["device"]:
            continue
        for cell in results["cells"]:
            settings = cell["settings"]
            if (cell["suite"], cell["case"]) != (bar.suite, bar.case) or settings.get(bar.axis) not in bar.at:
                continue
            if settings["set"] or any(settings.get(name) != value for name, value in bar.settings.items()):
                continue
            if "stream" in cell and (growth := cell["stream"]["growth_bytes"]) is not None:
                yield settings[bar.axis], growth, ""
            for entry in cell.get("entries", ()):
                if entry["name"] in bar.names and "ratio" in entry:
                    yield settings[bar.axis], entry["ratio"]["median"], entry["name"]
