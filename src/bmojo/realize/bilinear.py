"""Bilinear models, and one whose Volterra kernels are those of a smooth system, to any order.

    z(t+1) = A z(t) + sum_q v_q(t) (N_q z(t) + b_q),   y(t) = C z(t),   z(0) = 0

The v are monomials of the input u [m]: u itself for a bilinear model proper. In discrete time the square of a state
holds the square of the input of the same moment, so products u_i(t) u_j(t) ... are inputs too (a state-affine model);
what is bilinear is the state with the input. It is what a selective state-space layer is: its transition is
A + sum_q v_q N_q.

A Volterra kernel is a coefficient of y(t) as a power series in all past inputs. Here it is a product of matrices:

    of v_q1(t-l_1) ... v_qj(t-l_j), l_1 > ... > l_j >= 1:    C A^(l_j - 1) N_qj ... A^(l_1 - l_2 - 1) b_q1

Sources: Carleman 1932; Krener 1975, SIAM J. Control 13, 670-676; Fliess 1981; Sontag 1979 (discrete time).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmojo.errors import RealizationError
from bmojo.realize.lti import Array, numbers, whole

MOST_STATES = 1000
Exponents = tuple[int, ...]
Polynomial = dict[Exponents, float]


@dataclass(frozen=True, eq=False)
class Bilinear:
    A: Array  # [n, n]
    N: Array  # [q, n, n]
    B: Array  # [n, q]: the b_q
    C: Array  # [p, n]
    powers: Array  # [q, m]: v_q = prod_i u_i^powers[q, i]; the identity for v = u

    def respond(self, u: Array) -> Array:
        """y [T, p] for u [T, m]; y(t) is what the inputs before t make of it."""
        u = numbers("the input", u)
        if u.ndim != 2 or u.shape[1] != self.powers.shape[1]:
            raise RealizationError(f"an input must be [T, {self.powers.shape[1]}], got {list(u.shape)}")
        v, z = np.prod(u[:, None] ** self.powers, -1), np.zeros((len(u), len(self.A)))
        for t in range(len(u) - 1):
            z[t + 1] = self.A @ z[t] + v[t] @ (self.N @ z[t]) + self.B @ v[t]
        return z @ self.C.T

    def kernel(self, terms: Sequence[tuple[int, int]]) -> Array:
        """The coefficient [p] in y(t) of the product of v_q(t - lag) over the `terms` (lag, q), all lags different."""
        lags = [lag for lag, _ in terms]
        if not terms or min(lags) < 1 or len(set(lags)) < len(lags):
            raise RealizationError(f"terms must have lags that differ and are 1 or more, got {lags}")
        (last, q), *rest = sorted(terms, reverse=True)
        z = self.B[:, q]
        for lag, q in rest:
            z = self.N[q] @ np.linalg.matrix_power(self.A, last - lag - 1) @ z
            last = lag
        return self.C @ np.linalg.matrix_power(self.A, last - 1) @ z


def carleman(
    f: Callable[[Any, Any], Any], g: Callable[[Any], Any], *, states: int, inputs: int, order: int
) -> Bilinear:
    """The bilinear model whose Volterra kernels are those of x(t+1) = f(x, u), y = g(x), x(0) = 0, up to `order`.

    f and g are smooth functions of torch tensors, x [states] and u [inputs], with f(0, 0) = 0 and g(0) = 0. The states
    z are the monomials of x of degrees 1 ... order; their next values, products of f, are expanded in x and u and cut
    above `order`. As x is of the first order in the past inputs, nothing of that order or below is cut, so the kernels
    are equal; above `order` they are not. order=1 is the linearization. C(states + order, order) - 1 states.
    Refused: f that gives another number of states, 0 that is no equilibrium, derivatives that are not finite, and more
    than 1000 states.
    """
    for name, size in (("states", states), ("inputs", inputs), ("order", order)):
        whole(name, size, 1)
    if (size := math.comb(states + order, order) - 1) > MOST_STATES:
        raise RealizationError(f"order {order} of {states} states takes {size} states, above {MOST_STATES}; lower it")
    n = states
    moves = _taylor(lambda w: f(w[:n], w[n:]), n + inputs, order, "f(0, 0)")
    if len(moves) != n:
        raise RealizationError(f"f must give the next {n} states, got {len(moves)} numbers")
    reads = _taylor(g, n, order, "g(0)")
    basis, powers = _monomials(n, order), _monomials(inputs, order)
    z_of, v_of = ({exponents: i for i, exponents in enumerate(known)} for known in (basis, powers))
    A, B = np.zeros((len(basis),) * 2), np.zeros((len(basis), len(powers)))
    N, C = np.zeros((len(powers), *A.shape)), np.zeros((len(reads), len(basis)))
    for row, exponents in enumerate(basis):
        product: Polynomial = {(0,) * (n + inputs): 1.0}
        for i, power in enumerate(exponents):
            for _ in range(power):
                product = _times(product, moves[i], order)
        for both, value in product.items():
            x, u = both[:n], both[n:]
            if not any(u):
                A[row, z_of[x]] = value
            elif not any(x):
                B[row, v_of[u]] = value
            else:
                N[v_of[u], row, z_of[x]] = value
    for row, polynomial in enumerate(reads):
        for exponents, value in polynomial.items():
            C[row, z_of[exponents]] = value
    return Bilinear(A, N, B, C, np.array(powers))


def _monomials(variables: int, order: int) -> list[Exponents]:
    """The exponents of all monomials of degrees 1 ... order, lowest degree first."""
    return [
        _exponents(which, variables)
        for degree in range(1, order + 1)
        for which in itertools.combinations_with_replacement(range(variables), degree)
    ]


def _exponents(which: tuple[int, ...], variables: int) -> Exponents:
    """Of the product of the variables `which`."""
    count = Counter(which)
    return tuple(count[i] for i in range(variables))


def _times(a: Polynomial, b: Polynomial, order: int) -> Polynomial:
    """The product, cut above `order`."""
    product: Polynomial = Counter()  # type: ignore[assignment]
    for (one, x), (other, y) in itertools.product(a.items(), b.items()):
        both = tuple(i + j for i, j in zip(one, other, strict=True))
        if sum(both) <= order:
            product[both] += x * y
    return product


def _taylor(f: Callable[[Any], Any], variables: int, order: int, origin: str) -> list[Polynomial]:
    """The Taylor polynomials of the components of f at 0, where f must be 0."""
    import torch

    zero = torch.zeros(variables, dtype=torch.float64)
    values = f(zero)
    if not isinstance(values, torch.Tensor):
        raise RealizationError(f"{origin} must be a torch tensor, got {type(values).__name__}; compute with torch")
    if values.ndim != 1 or not bool((values.abs() <= 1e-12).all()):
        raise RealizationError(f"{origin} must be a vector of zeros, got {values.tolist()}; shift the equilibrium to 0")
    polynomials: list[Polynomial] = [{} for _ in values]
    for degree in range(1, order + 1):
        f = torch.func.jacrev(f)
        derivatives = np.moveaxis(numbers(f"the derivatives of order {degree}", f(zero)), 0, -1)
        for which in itertools.combinations_with_replacement(range(variables), degree):
            exponents = _exponents(which, variables)
            scale = math.prod(math.factorial(i) for i in exponents)
            for polynomial, value in zip(polynomials, derivatives[which], strict=True):
                if value:
                    polynomial[exponents] = float(value) / scale
    return polynomials
