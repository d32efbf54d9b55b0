"""Moving scenes made by rule, to fit textures to: frames [T, H, W, C] in 0..1, and periodic in neither space nor time
unless said."""

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
