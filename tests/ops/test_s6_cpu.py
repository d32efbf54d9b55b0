"""The scan of Mamba-1 in C++: what it computes is the definition, wherever and however it is called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from bmojo.ops import dispatch, native, s6_cpu
from bmojo.ops.s6 import s6, s6_chunked, s6_naive

CHUNK = 16
NAMES = ("x", "dt", "A_log", "B", "C", "state")


def inputs(batch=2, time=112, channels=70, size=5, seed=0):
    """Random arguments in float64, with padded steps inside and at the end of the first row."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    dt = F.softplus(normal(batch, time, channels) - 1)
    dt[:, 3] = dt[0, time - 5 :] = 0
    return {"x": normal(batch, time, channels), "dt": dt, "A_log": normal(channels, size),
            "B": normal(batch, time, size), "C": normal(batch, time, size),
            "state": normal(batch, size, channels)}  # fmt: skip


def run(form, args, dtype=torch.float32, **options):
    """Output, final state, and the gradients by name."""
    args = {name: z.detach().to(dtype).requires_grad_() for name, z in args.items()}
    y, final = form(**args, chunk_size=CHUNK, **options)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, dtype=torch.float64, generator=draw).to(dtype) for z in (y, final)]
    ((y * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return {"y": y.detach(), "final": final.detach()} | {f"d{name}": z.grad for name, z in args.items()}


def near(got, expected, tolerance=1e-6):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].double() - value).square().mean().sqrt() / value.square().mean().sqrt().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.1e}"


# one channel, one vector, one tile and one more; spans of 32 steps, whole and not; one state and many
@pytest.mark.parametrize(("channels", "size"), [(1, 1), (16, 3), (64, 16), (65, 17), (200, 2)])
@pytest.mark.parametrize("time", [16, 32, 48, 112])
def test_it_is_the_definition(time, channels, size):
    args = inputs(time=time, channels=channels, size=size)
    near(run(s6_cpu.s6, args), run(s6_naive, args, torch.float64))


def test_documents_start_anew():
    args = inputs()
    resets = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1]]).bool()
    got, expected = (
        run(form, args, z, resets=resets) for form, z in ((s6_cpu.s6, torch.float32), (s6_naive, torch.float64))
    )
    assert (got["dstate"][1] == 0).all()
    near(got, expected)


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_read_before_the_write(with_grad):
    args = {name: z.float().requires_grad_(with_grad) for name, z in inputs().items()}
    exact = {name: z.detach().double() for name, z in args.items()}
    resets = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1]]).bool()
    options = {"chunk_size": CHUNK, "resets": resets, "exclusive": True}
    got, expected = s6_cpu.s6(**args, **options), s6_naive(**exact, **options)
    assert got[0].requires_grad == with_grad
    near(dict(enumerate(got)), dict(enumerate(expected)))


def test_strong_and_weak_decays_keep_their_digits():
    """From steps that forget nothing to steps that forget all: exp(-1e-6) to exp(-1e6)."""
    args = inputs(channels=64, size=8)
    args["A_log"] = torch.linspace(-7, 7, 64 * 8, dtype=torch.float64).view(64, 8) * 2.3 / 1.17
    near(run(s6_cpu.s6, args), run(s6_naive, args, torch.float64))


def test_a_padded_step_is_exactly_the_identity():
    args = {name: z.float() for name, z in inputs().items()}
    args["dt"] = torch.zeros_like(args["dt"])
    assert torch.equal(s6_cpu.s6(**args, chunk_size=CHUNK)[1], args["state"])


def test_long_sums_are_as_good_as_naive_in_float32():
    args = inputs(1, 4096, 16, 4)
    exact = run(s6_naive, args, torch.float64)
    near(run(s6_cpu.s6, args), exact, 2e-6)


def test_gradients_of_less_than_everything():
    """Of the output alone, of the state alone; for one argument, for none."""
    args = {name: z.float() for name, z in inputs().items()}
    state = args.pop("state")
    for part in (0, 1):
        x = args["x"].clone().requires_grad_()
        y = s6_cpu.s6(**args | {"x": x}, chunk_size=CHUNK, state=state)[part]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        z = args["x"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(s6_chunked(**args | {"x": z}, chunk_size=CHUNK, state=state)[part].sum(), z)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not s6_cpu.s6(**args, chunk_size=CHUNK)[0].requires_grad


def test_threads_change_no_bit():
    args = inputs(3, 64, 200, 4)
    one = run(s6_cpu.s6, args)
    torch.set_num_threads(2)
    try:
        two = run(s6_cpu.s6, args)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_arguments_in_any_layout_are_left_as_they_are():
    args = inputs()
    expected = run(s6_cpu.s6, args)
    strided = {name: z.mT.contiguous().mT if z.ndim > 1 else z for name, z in args.items()}
    assert not strided["x"].is_contiguous()
    copies = {name: z.clone() for name, z in strided.items()}
    got = run(s6_cpu.s6, strided)
    assert all(torch.equal(strided[name], copies[name]) for name in NAMES)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_no_memory_is_read_before_it_is_written(monkeypatch):
    """`torch.empty` filled with NaN gives the same."""
    args = inputs()
    expected = run(s6_cpu.s6, args)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = run(s6_cpu.s6, args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_lost(name):
    args = {name: z.float() for name, z in inputs().items()}
    args[name].view(-1)[2] = torch.nan
    y, final = s6_cpu.s6(**args, chunk_size=CHUNK)
    assert y.isnan().any()
    assert final.isnan().any() or name == "C"


def test_infinities_of_one_row_stay_in_it():
    args = {name: z.float() for name, z in inputs(4).items()}
    clean = s6_cpu.s6(**args, chunk_size=CHUNK)[0]
    args["x"][1] = torch.inf
    y = s6_cpu.s6(**args, chunk_size=CHUNK)[0]
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


def test_bfloat16_is_scanned_in_float32():
    args = {name: z.bfloat16() for name, z in inputs().items()}
    got = s6_cpu.s6(**args, chunk_size=CHUNK)
    expected = s6_naive(**{name: z.double() for name, z in args.items()}, chunk_size=CHUNK)
    assert {z.dtype for z in got} == {torch.float32}
    near(dict(enumerate(got)), dict(enumerate(expected)))


def test_float64_runs_chunked():
    args = inputs()
    got, expected = (form(**args, chunk_size=CHUNK) for form in (s6, s6_chunked))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_tokens_leave_the_state():
    args = {name: z[:, :0] if name not in ("A_log", "state") else z for name, z in inputs().items()}
    y, final = s6_cpu.s6(**{name: z.float() for name, z in args.items()}, chunk_size=CHUNK)
    assert y.shape == (2, 0, 70)
    assert torch.equal(final, args["state"].float())


def test_the_ops_keep_the_contract_of_the_compiler():
    """Fake tensors, aliasing, registration of gradients: torch's own checks of a custom op."""
    args = {name: z.float() for name, z in inputs(time=48).items()}
    A = -args["A_log"].exp().T.contiguous()
    tensors = [args["x"], args["dt"], A, args["B"], args["C"], args["state"]]
    resets = torch.tensor([[0, 1, 0], [0, 0, 1]]).bool()
    tensors = [z.requires_grad_() for z in tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.bmojo.s6_forward.default, (*tensors, resets, CHUNK, False, True), test_utils=checks)


def test_arguments_that_do_not_fit_are_refused():
    args = {name: z.float() for name, z in inputs().items()}
    with pytest.raises(RuntimeError, match=r"s6: expected a contiguous tensor of \[2, 112, 5\], .* got \[2, 111, 5\]"):
        s6_cpu.s6(**args | {"C": args["C"][:, 1:]}, chunk_size=CHUNK)


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_as_one_graph():
    args = {name: z.float() for name, z in inputs().items()}
    expected = run(s6, args)
    torch.compiler.reset()
    got = run(torch.compile(s6, backend="aot_eager", fullgraph=True), args)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_exported():
    class Scan(torch.nn.Module):
        def forward(self, x, dt, A_log, B, C, state):
            return s6(x, dt, A_log, B, C, chunk_size=CHUNK, state=state)

    args = tuple(inputs()[name].float() for name in NAMES)
    expected = Scan()(*args)
    with torch.no_grad():
        program = torch.export.export(Scan(), args)
    nodes = [str(node.target) for part in program.graph_module.modules() for node in part.graph.nodes]
    assert "bmojo.s6_forward.default" in nodes
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*args), expected, strict=True))


def test_a_machine_without_a_compiler_is_told_and_runs_chunked(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_failed", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ImportError, match=r"s6_cpu.cpp can't be compiled here .*no-such-compiler"):
        native.load_ops("s6_cpu.cpp")
    assert not list(tmp_path.rglob("*.so"))

    def missing(name):
        raise ImportError("no compiler")

    monkeypatch.setattr(dispatch, "_kernels", {})
    monkeypatch.setattr(dispatch.importlib, "import_module", missing)
    args = {name: z.float() for name, z in inputs().items()}
    with pytest.warns(UserWarning, match="no fused s6, the chunked form runs, which is slower: no compiler"):
        got = s6(**args, chunk_size=CHUNK)
    assert torch.equal(got[0], s6_chunked(**args, chunk_size=CHUNK)[0])


def test_an_error_of_the_compiler_is_in_the_reason(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho unknown option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "_failed", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ImportError, match="unknown option"):
        native.load_ops("s6_cpu.cpp")


@pytest.fixture
def loads(tmp_path):
    """Start a process that loads the kernel from an empty cache, compiled by `compiler`."""
    started = []

    def start(compiler):
        script = tmp_path / "compiler"
        script.write_text(f"#!/bin/sh\necho >> {tmp_path / 'calls'}\n{compiler}\n")
        script.chmod(0o755)
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(script)}
        command = [sys.executable, "-c", "import bmojo.ops.s6_cpu"]
        started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_killed_build_is_in_nobodys_way_and_two_processes_build_once(loads, tmp_path):
    killed = loads("exec sleep 600")
    while not (tmp_path / "calls").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    (tmp_path / "calls").unlink()
    both = [loads('exec c++ "$@"') for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "calls").read_text() == "\n\n"  # compiled and linked, once
    assert len(list(tmp_path.rglob("*.so"))) == 1
