"""Moving scenes made by rule, to fit textures to: frames [T, H, W, C] in 0..1, the same for the same seed."""

from __future__ import annotations

import numpy as np


def wave(frames: int = 120, size: int = 64, noise: float = 0.01, seed: int = 0) -> np.ndarray:
    """Two plane waves that cross, of periods 12 and 7.3 frames, and white noise of that deviation: [T, size, size, 1].

    Without noise its frames are mixtures of four images and the mean: four states describe it.
    """
    t, y, x = _grid(frames, size)
    scene = 0.5 + 0.2 * np.cos(2 * np.pi * (3 * x - t / 12)) + 0.1 * np.cos(2 * np.pi * (2 * y + x + t / 7.3))
    return (scene + noise * np.random.default_rng(seed).standard_normal(scene.shape))[..., None]


def _grid(frames: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t in frames, y and x in 0..1, to broadcast."""
    t, y, x = np.ogrid[:frames, :size, :size]
    return t, y / size, x / size


def water(frames: int = 400, size: int = 64, waves: int = 16, seed: int = 0) -> np.ndarray:
    """Light on water: [T, size, size, 3].

    Plane waves in all directions, longer ones faster, as in deep water (w^2 ~ k); slopes towards the light are bright,
    by more than in proportion.
    """
    rng = np.random.default_rng(seed)
    t, y, x = _grid(frames, size)
    slope = np.zeros((frames, size, size))
    for _ in range(waves):
        ky, kx = rng.integers(-5, 6, 2)
        k = np.hypot(ky, kx) + 0.5
        slope += k**-0.7 * np.cos(2 * np.pi * (ky * y + kx * x - 0.025 * np.sqrt(k) * t + rng.random()))
    light = np.clip(0.35 + 0.2 * slope, 0, None) ** 1.5
    return np.clip(light[..., None] * np.array([0.55, 0.85, 1.0]) + np.array([0.0, 0.08, 0.18]), 0, 1)


def flame(frames: int = 400, size: int = 64, seed: int = 0) -> np.ndarray:
    """Fire: clouds of noise that rise and change, the smaller the faster, cut to a hearth: [T, size, size, 3]."""
    rng = np.random.default_rng(seed)
    t, y, x = _grid(frames, size)
    clouds = np.zeros((frames, size, size))
    for k in (1, 2, 4):
        for _ in range(8):
            kx, turn, phase = rng.integers(-k, k + 1), rng.normal(0, 0.01 * k), rng.random()
            clouds += np.cos(2 * np.pi * (k * (y + 0.02 * t) + kx * x + turn * t + phase)) / k
    hearth = 1.5 * y - 0.2 - 4 * (1.4 - y) * np.square(x - 0.5)
    heat = np.clip(hearth + 0.14 * clouds, 0, 1)
    return np.stack((np.clip(2.2 * heat, 0, 1), np.clip(2.2 * heat - 0.7, 0, 1), np.clip(3 * heat - 2.2, 0, 1)), -1)
