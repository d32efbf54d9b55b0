"""Forms for compilers that have neither factorisations nor sorting, such as that of Trainium: comparisons, elementwise
operations and matrix products, in graphs whose size does not depend on the length of the sequence.

They are what `ops.dispatch` runs on devices of type "xla"; arguments and results as of the forms they stand for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # tokens that are eliminated in one system: fewer are fewer steps, and more memory


def eliminate(system: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Gaussian elimination of the first `count` unknowns of symmetric systems [..., n, n], without pivoting.

    Returns the pivots [..., count], and the Schur complement [..., n - count, n - count] that is left.
    """
    pivots = []
    for _ in range(count):
        pivot, column = system[..., :1, :1], system[..., 1:, :1]
        pivots.append(pivot[..., 0, 0])
        system = system[..., 1:, 1:] - column * (column.mT / pivot)
    return torch.stack(pivots, -1), system


def leverage(k: Tensor, M: Tensor) -> Tensor:
    """What is left, but for its sign, of [[M, k], [k^T, 0]] when M is eliminated."""
    _, left = eliminate(_bordered(M, k[..., None, :], 0.0), M.shape[-1])
    return -left[..., 0, 0]


def variances(K: Tensor, M: Tensor) -> Tensor:
    """Eliminating M and then the tokens of [[M, K^T], [K, -I]] leaves, one after the other, minus what is asked for.

    Blocks of tokens go side by side: each starts from M and the tokens of its chunk before it.
    """
    chunk, dim = K.shape[-2:]
    block = next(size for size in range(min(BLOCK, chunk), 0, -1) if chunk % size == 0)
    blocks = K.unflatten(-2, (-1, block))
    earlier = torch.ones(chunk // block, chunk // block, dtype=K.dtype, device=K.device).tril(-1)
    seen = torch.einsum("ab,...bij->...aij", earlier, blocks.mT @ blocks)
    pivots, _ = eliminate(_bordered(M[..., None, :, :] + seen, blocks, -1.0), dim + block)
    return -pivots[..., dim:].flatten(-2)


def _bordered(M: Tensor, K: Tensor, corner: float) -> Tensor:
    """[[M, K^T], [K, corner I]]."""
    own = corner * torch.eye(K.shape[-2], dtype=K.dtype, device=K.device).expand(*K.shape[:-1], -1)
    return torch.cat((torch.cat((M, K.mT), -1), torch.cat((K, own), -1)), -2)


def solve_unit_lower(system: Tensor, right: Tensor) -> Tensor:
    """By the inverse, from ever larger blocks of the diagonal:  [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]."""
    size = system.shape[-1]
    whole = 1 << (size - 1).bit_length()
    system = F.pad(system, (0, whole - size, 0, whole - size))
    inverse, width = torch.ones_like(system[..., :1, None]), 1  # [..., blocks, width, width]
    while width < whole:
        pairs = system.unflatten(-1, (-1, 2 * width)).unflatten(-3, (-1, 2 * width))  # [..., a, i, b, j]
        same = torch.eye(pairs.shape[-2], dtype=system.dtype, device=system.device)[:, None, :, None]
        below = (pairs[..., width:, :, :width] * same).sum(-2)
        upper, lower = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corner = -(lower @ below @ upper)
        inverse = torch.cat((torch.cat((upper, torch.zeros_like(corner)), -1), torch.cat((corner, lower), -1)), -2)
        width *= 2
    return inverse[..., 0, :size, :size] @ right


def best_first(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A candidate's place is the number of those that are better, or equal and before it."""
    n = value.shape[1]
    other, own = value[:, None, :], value[:, :, None]
    before = torch.ones(n, n, dtype=torch.bool, device=value.device).tril(-1)
    place = ((other > own) | ((other == own) & before)).to(torch.float32).sum(-1)
    slots = torch.arange(count, dtype=torch.float32, device=value.device)
    chosen = place[:, None, :] == slots[:, None]
    number = torch.arange(n, dtype=torch.float32, device=value.device)
    order = (chosen * number).sum(-1).long().clamp(max=n - 1)  # values that are not numbers have no places of their own
    return value.gather(1, order), order
