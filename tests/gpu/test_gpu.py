"""On a CUDA device: the fused forms against the definitions, bfloat16, CUDA graphs, no waiting, constant latency."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reading import CALLS, drawn
from torch import Tensor

from bmojo import presets
from bmojo.memory import flex
from bmojo.memory.read import read_naive
from bmojo.nn.decoder import Decoder
from bmojo.nn.loss import auxiliary_loss, cross_entropy
from bmojo.nn.mixer import Trace
from bmojo.nn.model import BMojoLM
from bmojo.ops import dispatch, gated_delta, innovation, s6, ssd
from bmojo.ops.dispatch import use_backend

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CHUNK, TIME, VOCAB = 64, 5 * 64, 256
BUDGET = 2e-2  # RMS error over RMS, of bfloat16 kernels on inputs that are exact in bfloat16
BOUNDED = [name for name in presets.PRESETS if name != "transformer"]


@pytest.fixture(autouse=True)
def exact_float32():
    """The forms that must be exact are: no TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-6))


def scan_inputs(op: str, groups: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    alive = (torch.arange(TIME) < TIME - 5)[:, None]
    if op == "ssd":
        args = {"x": normal(TIME, 4, 64), "dt": F.softplus(normal(TIME, 4) - 2) * alive, "A_log": normal(4)[0],
                "B": normal(TIME, groups, 32), "C": normal(TIME, groups, 32)}  # fmt: skip
    else:
        q, k = (F.normalize(normal(TIME, 4, 32), dim=-1) for _ in range(2))
        args = {"q": q, "k": k, "v": normal(TIME, 4, 64), "beta": normal(TIME, 4).sigmoid() * alive,
                "g": -F.softplus(normal(TIME, 4) - 3) * alive}  # fmt: skip
    rows = {n: z.bfloat16() if n in ("x", "B", "C", "q", "k", "v") else z for n, z in args.items()}
    rows["state"] = normal(4, 32, 64)
    kinds = {n: dtype if z.dtype == torch.bfloat16 else torch.float32 for n, z in rows.items()}
    return {n: z.to(DEVICE, kinds[n]).requires_grad_() for n, z in rows.items()}


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("op", "groups"), [("ssd", 1), ("ssd", 2), ("gated_delta", 4)])
def test_scans_in_bfloat16(op, groups, reset, exclusive):
    module = {"ssd": ssd, "gated_delta": gated_delta}[op]
    resets = (
        torch.rand(2, TIME // CHUNK, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.4 if reset else None
    )
    results = []
    for form, dtype in ((getattr(module, f"{op}_naive"), torch.float32), (getattr(module, op), torch.bfloat16)):
        args = scan_inputs(op, groups, dtype)
        out, final = form(**args, chunk_size=CHUNK, resets=resets, exclusive=exclusive)
        assert out.dtype == final.dtype == torch.float32
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        ((out * weight).sum() + final.sum()).backward()
        results.append({"out": out, "final": final} | {f"d{name}": z.grad for name, z in args.items()})
    assert dispatch._kernels[f"bmojo.ops.fla:{op}"] is not None
    for name, expected in results[0].items():
        assert error(results[1][name], expected) <= BUDGET, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reset", [False, True])
def test_s6(reset, dtype):
    resets = (torch.arange(TIME // CHUNK) % 2 == 1).expand(2, -1).to(DEVICE) if reset else None
    results = []
    for form, kind in ((s6.s6_naive, torch.float32), (s6.s6, dtype)):
        generator = torch.Generator().manual_seed(0)
        x, dt = (torch.randn(2, TIME, 100, generator=generator) for _ in range(2))
        B, C = (torch.randn(2, TIME, 16, generator=generator).bfloat16().to(DEVICE, kind) for _ in range(2))
        A_log, state = torch.randn(100, 16, generator=generator), torch.randn(2, 16, 100, generator=generator)
        args = {"x": x.bfloat16().to(DEVICE, kind), "dt": F.softplus(dt - 2), "A_log": A_log, "B": B, "C": C,
                "state": state}  # fmt: skip
        args = {name: z.to(DEVICE).requires_grad_() for name, z in args.items()}
        y, final = form(**args, chunk_size=CHUNK, resets=resets)
        (y.sin().sum() + final.sum()).backward()
        results.append({"y": y, "final": final} | {f"d{name}": z.grad for name, z in args.items()})
    assert dispatch._kernels["bmojo.ops.triton_s6:s6"] is not None
    for name, expected in results[0].items():
        assert error(results[1][name], expected) <= (1e-5 if dtype == torch.float32 else BUDGET), name


@pytest.mark.parametrize("dim", [8, 32, 100])
def test_innovation_scores(dim):
    generator = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(2, TIME, dim, generator=generator), dim=-1).to(DEVICE)
    valid = torch.ones(2, TIME, dtype=torch.bool, device=DEVICE)
    valid[0, -7:] = False
    resets = (torch.arange(TIME // CHUNK) == 2).expand(2, -1).to(DEVICE)
    options = {"chunk_size": CHUNK, "forgetting": 0.995, "resets": resets}
    expected = innovation.rls_naive(k.double(), valid, *innovation.rls_start(2, dim, k.double()), **options)
    got = innovation.rls(k, valid, *innovation.rls_start(2, dim, k), **options)
    assert dispatch._kernels["bmojo.ops.triton_rls:rls"] is not None
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-5), (torch.bfloat16, BUDGET)])
@pytest.mark.parametrize("shape", [(1, 4, 2, 64, 64), (64, 2, 2, 64, 64), (1, 4, 1, 128, 64)])
@pytest.mark.parametrize("call", CALLS)
def test_reading_the_memories(call, shape, dtype, budget):
    results = []
    for form, kind in ((read_naive, torch.float32), (flex.read_flex, dtype)):
        q, sources, slots, layout = drawn(call, *shape, scale=16, device=DEVICE, dtype=kind)
        leaves = {"q": q, "slot k": slots.k, "slot v": slots.v}
        for i, source in enumerate(sources):
            leaves |= {f"k {i}": source.k, f"v {i}": source.v}
        o, used = form(q, sources, slots, layout, usage=True)
        o = o * layout.valid[..., None, None]
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, o.dtype)
        gradients = torch.autograd.grad((o * weight).sum(), list(leaves.values()))
        results.append({"o": o, "used": used} | {f"d {n}": z for n, z in zip(leaves, gradients, strict=True)})
    for name, expected in results[0].items():
        assert error(results[1][name], expected) <= budget, name


def preset(name: str, **changes) -> BMojoLM:
    torch.manual_seed(0)
    return BMojoLM(presets.get(name, "tiny", vocab_size=VOCAB, **changes)).to(DEVICE)


def train(model: BMojoLM, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    trace = Trace()
    logits, _ = model(tokens, trace=trace)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (loss + auxiliary_loss(trace)).backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_training_in_bfloat16_with_float32_states(name):
    """The loss within 1 % of float32's; gradients of float32 weights; states that stay exact in a half call."""
    model, tokens = preset(name), torch.randint(VOCAB, (2, 320), device=DEVICE)
    with use_backend("chunked"):
        expected, _ = train(copy.deepcopy(model), tokens)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, gradients = train(model, tokens)
        _, state = model(tokens[:, :100])
    assert abs(loss - expected) <= 1e-2 * expected
    assert all(z is not None and z.dtype == torch.float32 and z.isfinite().all() for z in gradients.values())
    for layer in state.layers:
        assert all(layer[n].dtype == torch.float32 for n in layer.keys() & {"ssm", "slot_score", "pending", "rls_M"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOUNDED)
@torch.no_grad()
def test_decoding_in_a_cuda_graph(name, dtype):
    """Over two ends of chunks, and again from a snapshot."""
    model, tokens = preset(name).to(dtype), torch.randint(VOCAB, (3, 200), device=DEVICE)
    _, state = model(tokens[:, :50])
    decoder, mine = Decoder(model, state), state
    assert decoder.static
    for t in range(50, 120):
        expected, mine = model(tokens[:, t : t + 1], mine)
        assert error(decoder(tokens[:, t]), expected[:, 0]) <= (1e-5 if dtype == torch.float32 else 1e-2)
    snapshot = decoder.state
    first = [decoder(tokens[:, t]).clone() for t in range(120, 200)]
    decoder.state = snapshot
    again = [decoder(tokens[:, t]).clone() for t in range(120, 200)]
    assert torch.equal(torch.stack(first), torch.stack(again))


@pytest.mark.parametrize("name", BOUNDED)
def test_steps_do_not_wait_for_the_device(name):
    model, tokens = preset(name), torch.randint(VOCAB, (2, 320), device=DEVICE)
    for _ in range(2):  # the first compiles
        train(model, tokens)
        with torch.no_grad():
            _, state = model(tokens[:, :1], model.empty_state(2))
            model(tokens[:, :1], state, donate=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, tokens)
        with torch.no_grad():
            model(tokens[:, :1], state, donate=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_latency_does_not_grow_with_the_context():
    model, token = preset("bmojo").bfloat16(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _, state = model(torch.randint(VOCAB, (1, 1024), device=DEVICE))
    far = state.clone()
    for layer in far.layers:
        layer["position"] += 64 * 2**14  # a million tokens on
    decoders, times = [Decoder(model, state), Decoder(model, far)], [[], []]
    for decoder in decoders:
        decoder(token)
    for _ in range(7):
        for decoder, taken in zip(decoders, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(64):
                decoder(token)
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
    near, after = (sorted(taken)[3] for taken in times)
    assert after <= 1.1 * near
