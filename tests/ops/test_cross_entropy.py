"""The cross entropy of a head by chunks is that of all its logits, and holds no more of them than it says."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad_and_value
from torch.utils._python_dispatch import TorchDispatchMode

from bmojo.ops import cross_entropy
from bmojo.ops.cross_entropy import linear_cross_entropy_chunked, linear_cross_entropy_naive

VOCAB, SIZE, ROWS = 13, 6, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", 4 * VOCAB * ROWS)


def inputs(n, dtype=torch.float64, vocab=VOCAB, size=SIZE):
    draw = torch.Generator().manual_seed(n)
    x, weight = (torch.randn(m, size, generator=draw, dtype=torch.float64).to(dtype) for m in (n, vocab))
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (n,), generator=draw)


def with_gradients(op, x, weight, labels):
    loss = op(x, weight, labels)
    return loss, *torch.autograd.grad(0.3 * loss, (x, weight))


@pytest.mark.parametrize("ignored", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 1, ROWS, ROWS + 1, 3 * ROWS, 29])
def test_chunked_equals_naive(n, ignored):
    x, weight, labels = inputs(n)
    if ignored:
        labels[::ignored] = -100
    expected = with_gradients(linear_cross_entropy_naive, x, weight, labels)
    found = with_gradients(linear_cross_entropy_chunked, x, weight, labels)
    for name, a, b in zip(("loss", "dx", "dweight"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
    if ignored == 1 or n == 0:
        assert not any(bool(part.any()) for part in expected)


def test_gradients_are_those_of_differences():
    x, weight, labels = inputs(20)
    assert torch.autograd.gradcheck(lambda *tensors: linear_cross_entropy_chunked(*tensors, labels), (x, weight))


def test_half_precision_is_as_exact_as_with_all_logits():
    x, weight, labels = inputs(300, torch.float32, size=64)
    wide = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    exact = [part.detach() for part in with_gradients(linear_cross_entropy_naive, *wide, labels)]
    errors = []
    for op in (linear_cross_entropy_chunked, linear_cross_entropy_naive):
        with torch.autocast("cpu", torch.bfloat16):
            found = [part.detach() for part in with_gradients(op, x, weight, labels)]
        assert {part.dtype for part in found} == {torch.float32}
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    for chunked, naive in zip(*errors, strict=True):
        assert chunked < 1.1 * naive + 1e-6
    found = with_gradients(linear_cross_entropy_chunked, x.bfloat16(), weight.bfloat16(), labels)
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_other_products_under_the_same_autocast_keep_their_gradients():
    x, weight, labels = inputs(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_chunked(x.detach(), weight, labels)
        other = F.linear(x.detach(), weight).sum()
    (alone,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (both,) = torch.autograd.grad(loss + other, weight)
    assert (both - alone).abs().max() > 1


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = inputs(20)
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy_chunked(*tensors).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy_chunked(*tensors).requires_grad


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that is made inside, but for those of one shape."""

    def __init__(self, but):
        super().__init__()
        self.but, self.bytes = but, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape != self.but:
                self.bytes = max(self.bytes, tensor.nbytes)
        return made


def test_no_more_than_a_chunk_of_logits_is_held():
    x, weight, labels = inputs(500, torch.float32, vocab=400, size=4)
    cross_entropy.LOGIT_BYTES = 4 * 400 * 50
    for op, most in ((linear_cross_entropy_naive, 4 * 400 * 500), (linear_cross_entropy_chunked, 4 * 400 * 50)):
        kept = []
        with (
            Largest(weight.shape) as largest,
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
            ),
        ):
            op(x, weight, labels).backward()
        assert largest.bytes == most
        if op is linear_cross_entropy_chunked:
            assert [tensor.shape for tensor in kept] == [x.shape, weight.shape]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler itself does it
def test_one_graph_and_transforms():
    x, weight, labels = inputs(29)
    labels[3] = -100
    expected = with_gradients(linear_cross_entropy_naive, x, weight, labels)
    (dx, dweight), loss = grad_and_value(linear_cross_entropy_chunked, argnums=(0, 1))(x, weight, labels)
    torch.testing.assert_close((loss, 0.3 * dx, 0.3 * dweight), expected, rtol=1e-10, atol=1e-10)
    compiled = torch.compile(linear_cross_entropy_chunked, backend="aot_eager", fullgraph=True)
    found = with_gradients(compiled, x, weight, labels)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_meta_and_labels_that_are_no_tokens():
    x, weight, labels = inputs(20)
    assert linear_cross_entropy_chunked(x.to("meta"), weight.to("meta"), labels.to("meta")).shape == ()
    for wrong in (VOCAB, -1):
        labels[2] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy_chunked(x, weight, labels)


def test_a_second_derivative_is_refused():
    x, weight, labels = inputs(20)
    (dx,) = torch.autograd.grad(linear_cross_entropy_chunked(x, weight, labels), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dx.sum().backward()
