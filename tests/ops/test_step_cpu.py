"""One token in C++: as in PyTorch, with the state written in place; where gradients are wanted, PyTorch itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close, draw_tokens, make_model, small_preset

from bmojo.ops import attention, gated_delta, innovation, layers, s6, ssd, step_cpu

KINDS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


def draw(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)


def cases(dtype: torch.dtype) -> dict:
    """Of each op: the form in C++, that in PyTorch, arguments, and which of them are written."""
    normal = draw(dtype)
    k = F.normalize(normal(2, 5), dim=-1)
    M = torch.eye(5, dtype=dtype) + 10 * (k.mT @ k)
    rls = {"k": F.normalize(normal(2, 5), dim=-1), "A": normal(2, 5, 5), "M": M.expand(2, -1, -1).clone(),
           "ends_chunk": torch.tensor([True, False])}  # fmt: skip
    rows = [normal(2, n, 2, 12) for n in (3, 40, 1)]
    masks = [torch.tensor([[True, False, True], [False] * 3]), torch.arange(80).view(2, 40) % 3 > 0,
             torch.tensor([[True], [False]])]  # fmt: skip
    step = {"x": normal(2, 4, 9), "dt": F.softplus(normal(2, 4)), "A_log": normal(4), "B": normal(2, 2, 3),
            "C": normal(2, 2, 3), "state": normal(2, 4, 3, 9)}  # fmt: skip
    delta = {"q": normal(2, 4, 3), "k": F.normalize(normal(2, 4, 3), dim=-1), "v": normal(2, 4, 9),
             "beta": normal(2, 4).sigmoid(), "g": -F.softplus(normal(2, 4)), "state": normal(2, 4, 3, 9)}  # fmt: skip
    selective = {"x": normal(2, 7), "dt": F.softplus(normal(2, 7)), "A_log": normal(7, 3), "B": normal(2, 3),
                 "C": normal(2, 3), "state": normal(2, 3, 7)}  # fmt: skip
    conv = {"x": normal(2, 7), "tail": normal(2, 3, 7), "weight": normal(7, 4), "bias": normal(7)}
    put = {"rows": normal(2, 5, 2, 3), "index": torch.tensor([4, 0]), "value": normal(2, 2, 3)}
    attend = {"q": normal(2, 4, 12), "keys": rows, "values": [normal(*z.shape) for z in rows], "masks": masks}
    return {
        "ssd": (step_cpu.ssd_decode, ssd.ssd_step, step, ["state"]),
        "s6": (step_cpu.s6_decode, s6.s6_step, selective, ["state"]),
        "gated_delta": (step_cpu.gated_delta_decode, gated_delta.gated_delta_step, delta, ["state"]),
        "conv": (step_cpu.causal_conv_decode, layers._causal_conv_decode, conv, ["tail"]),
        "conv of one tap": (step_cpu.causal_conv_decode, layers._causal_conv_decode,
                            conv | {"tail": normal(2, 0, 7), "weight": normal(7, 1)}, ["tail"]),
        "rls": (lambda **z: step_cpu.rls_decode(**z, forgetting=0.9), lambda **z: innovation.rls_step(
            **z, forgetting=0.9), rls, ["A", "M"]),
        "put": (step_cpu.put, attention._put, put, ["rows"]),
        "attend": (step_cpu.attend_rows, attention._attend_rows, attend, []),
    }  # fmt: skip


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
@pytest.mark.parametrize("name", cases(torch.float64))
@torch.no_grad()
def test_equals_the_form_in_pytorch(name, dtype, tolerance):
    fused, plain, arguments, written = cases(dtype)[name]
    expected = tensors(plain(**{k: z.clone() if k in written else z for k, z in arguments.items()}))
    got = tensors(fused(**arguments))
    for a, b in zip(got, expected, strict=True):
        close(a, b, tolerance)
    addresses = {z.data_ptr() for z in got if z.numel()}
    for one in written:
        assert not arguments[one].numel() or arguments[one].data_ptr() in addresses, f"{one} was not written in place"


@pytest.mark.parametrize("name", ["ssd", "gated_delta", "conv", "attend"])
def test_gradients_go_through_pytorch(name):
    fused, plain, arguments, _ = cases(torch.float64)[name]
    first = next(iter(arguments))
    for form in (fused, plain):
        arguments[first] = arguments[first].detach().requires_grad_()
        tensors(form(**arguments))[0].sum().backward()
        assert arguments[first].grad is not None


@torch.no_grad()
def test_nothing_visible_gives_zero():
    q, row = torch.randn(1, 2, 4), [torch.randn(1, 3, 2, 4)]
    assert (step_cpu.attend_rows(q, row, row, [torch.zeros(1, 3, dtype=torch.bool)]) == 0).all()


@torch.no_grad()
def test_other_dtypes_take_the_forms_in_pytorch():
    x, tail, weight = torch.randn(2, 7, dtype=torch.bfloat16), torch.randn(2, 3, 7), torch.randn(7, 4)
    for got, expected in zip(
        step_cpu.causal_conv_decode(x, tail, weight), layers._causal_conv_decode(x, tail, weight), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gdn", "bmojo"])
def test_a_state_that_gradients_need_is_not_written_to_unseen(name):
    model = make_model(small_preset(name))
    tokens = draw_tokens(2, 3)
    _, state = model(tokens[:, :1])
    logits, state = model(tokens[:, 1:2], state)
    with torch.no_grad():
        model(tokens[:, 2:], state.detach(), donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
