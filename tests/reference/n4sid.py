"""SLICOT's subspace identification (routines IB01AD and IB01BD, by way of ctrlsys), to compare with."""

from __future__ import annotations

import ctrlsys
import numpy as np
from scipy.linalg import solve_discrete_lyapunov

from bmojo.realize import LTI


def n4sid(y: np.ndarray, n: int, rows: int, method: str = "N") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, K, C of n states of y [N, p], from `rows` block rows. method: "N" for N4SID, "M" for MOESP."""
    N, p = y.shape
    y, none = np.asfortranarray(y - y.mean(0)), np.zeros((N, 0), order="F")
    _, r, _, _, info = ctrlsys.ib01ad(method, "C", "N", "O", "N", "N", rows, 0, p, none, y, 0.0, -1.0)
    assert info == 0
    A, C, _, _, _, _, _, K, _, info = ctrlsys.ib01bd(method, "A", "K", rows, n, 0, p, N, r, 0.0)
    assert info == 0
    return A, K, C


def predictor_excess(truth: LTI, A: np.ndarray, K: np.ndarray, C: np.ndarray) -> float:
    """`LTI.excess` of the predictor x(t+1) = (A - K C) x + K y, where A itself need not be stable; inf if it is not."""
    gain, R_e, _ = truth.innovations()
    F = A - K @ C
    if np.abs(np.linalg.eigvals(F)).max() >= 1:
        return np.inf
    joint = np.block([[truth.A, np.zeros((len(truth.A), len(F)))], [K @ truth.C, F]])
    noise = np.concatenate((gain, K))
    P = solve_discrete_lyapunov(joint, noise @ R_e @ noise.T)
    gap = np.concatenate((truth.C, -C), 1)
    return np.linalg.slogdet(gap @ P @ gap.T + R_e)[1] - np.linalg.slogdet(R_e)[1]
