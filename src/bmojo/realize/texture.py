"""Dynamic textures: a video as the output of a linear system that white noise drives.

    y(t) = mean + C x(t) + w(t),   x(t+1) = A x(t) + B v(t),   P = A P A' + B B'

Of the clip Y = [y(t) - mean], one column a frame, Y = U S V' gives C = U_n, X = S_n V_n' and P = X X' / T = S_n^2 / T,
diagonal. A is estimated in whitened coordinates z = P^(-1/2) x, where the covariance is I: there a system has that
stationary covariance just if its transition is a contraction, then B B' = I - A A', and its backward model is A'.
Source: Doretto, Chiuso, Wu and Soatto, Dynamic Textures, International Journal of Computer Vision 51(2), 2003.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bmojo.errors import CheckpointError, DataError, RealizationError
from bmojo.files import write_whole
from bmojo.realize.lti import LTI, MAX_CONDITION, real, whole
from bmojo.realize.video import DEFAULT_FPS

FORMAT = "bmojo.texture.1"
MEMORY = 0.9999  # the largest gain a step: 1.4 % of a mode's deviation is new in each frame, if it is not more
MAX_FRAMES = 100_000  # of one synthesis
SLOWEST = 1e-6  # below, rounding changes the covariance
ROUNDING = 1e-6  # by which a brightness may be out of 0 ... 1
ARRAYS = ("mean", "basis", "deviations", "transition")
NUMBERS = ("fps", "noise_floor", "clip_frames", "least_squares_radius")


@dataclass(frozen=True, eq=False)
class DynamicTexture:
    """A fitted dynamic texture of frames [H, W, C] with n states.

    texture = DynamicTexture.fit(video, states=20)
    slower = texture.synthesize(200, speed=0.5)
    """

    mean: np.ndarray  # [H, W, C]
    basis: np.ndarray  # [n, H, W, C], orthonormal: the columns of C as images
    deviations: np.ndarray  # [n], decreasing: P = diag(deviations^2)
    transition: np.ndarray  # [n, n]: P^(-1/2) A P^(1/2), no singular value above MEMORY
    fps: float
    noise_floor: float  # the root mean square of w(t), in brightness (0..1)
    clip_frames: int
    least_squares_radius: float  # the spectral radius of A before it was made a contraction

    def __post_init__(self) -> None:
        for name in ARRAYS:  # safetensors writes memory as it lies, whatever the strides
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float64))

    @classmethod
    def fit(cls, video: np.ndarray, states: int = 20, fps: float = DEFAULT_FPS) -> DynamicTexture:
        """The texture of a clip [T, H, W, 1 or 3], values in 0..1.

        A is the least-squares fit X_2 X_1^+ (`least_squares`, the exact DMD), in whitened coordinates, with singular
        values cut to MEMORY: the nearest A, in Frobenius norm there, of which the clip's own covariance P is the
        stationary one. At most one is above 1, as of P only the last frame is missing in X_1 X_1'. The
        least-squares A with Q of its residuals can be unstable, and has another P: see docs/textures.md.
        Raises DataError if this is no such video or has fewer than states + 2 frames, RealizationError if nothing moves
        in it or it has fewer than that many independent frames.
        """
        whole("states", states, 1)
        video = real("a video", video)
        if video.ndim != 4 or video.shape[-1] not in (1, 3) or 0 in video.shape:
            raise DataError(f"a video must be [frames, height, width, 1 or 3], got {list(video.shape)}")
        if not (video.min() >= -ROUNDING and video.max() <= 1 + ROUNDING):  # nan is neither
            raise DataError(
                f"the values of a video must be in 0 ... 1, got {video.min():.6g} to {video.max():.6g}; "
                "divide bytes by 255"
            )
        if not 0 < fps < math.inf:
            raise DataError(f"fps must be above 0, got {fps}")
        length = len(video)
        if length < states + 2:
            fewer = f"use at most {length - 2} (--states), or " if length > 2 else ""
            raise DataError(f"{states} states need at least {states + 2} frames, got {length}; {fewer}a longer clip")
        mean = video.mean(0)
        moving = (video - mean).reshape(length, -1)
        short = moving if length <= moving.shape[1] else moving.T
        values, vectors = np.linalg.eigh(short @ short.T)  # S^2 and V (or U), 30 times as fast as the SVD of the clip
        values, vectors = values[::-1], vectors[:, : -states - 1 : -1]
        if values[0] <= 1e-20 * video.size:
            raise RealizationError("nothing moves in this video: all its frames are the same; use another clip")
        rank = np.count_nonzero(values > 1e-12 * values[0])
        if rank < states:
            raise RealizationError(
                f"only {rank} states can be told from this video: its frames are mixtures of {rank} images and the "
                f"mean; use at most {rank} (--states), got {states}"
            )
        turn, S, right = np.linalg.svd(vectors.T @ short, full_matrices=False)
        white, basis = (vectors @ turn, right) if short is moving else (right.T, (vectors @ turn).T)
        peaks = np.abs(basis).argmax(1)
        signs = np.sign(basis[range(states), peaks])  # or a seed would give other frames on another machine
        white, basis = white * signs, basis * signs[:, None]
        A = least_squares(white.T)
        left, gains, right = np.linalg.svd(A)
        unseen = sum(np.square(frame - state @ basis).sum() for frame, state in zip(moving, white * S, strict=True))
        return cls(
            mean=mean,
            basis=basis.reshape(states, *mean.shape),
            deviations=S / math.sqrt(length),
            transition=(left * np.minimum(gains, MEMORY)) @ right,
            fps=fps,
            noise_floor=math.sqrt(unseen / video.size),
            clip_frames=length,
            least_squares_radius=_radius(A),
        )

    @property
    def states(self) -> int:
        return len(self.deviations)

    @property
    def radius(self) -> float:
        """The spectral radius of A: below 1."""
        return _radius(self.transition)

    @property
    def relative_error(self) -> float:
        """The noise floor over the root mean square of the clip's motion, y(t) - mean: what n states leave of it."""
        moved = np.square(self.deviations).sum() / self.mean.size
        return self.noise_floor / math.sqrt(self.noise_floor**2 + moved)

    @property
    def size(self) -> str:
        """How big a frame is, in words."""
        height, width, channels = self.mean.shape
        return f"{width} x {height} {'gray' if channels == 1 else 'in colour'}"

    @property
    def predicted(self) -> float:
        """How much of the variance of x(t+1) follows from x(t): trace(A P A') / trace(P)."""
        return float(np.square(self.deviations[:, None] * self.transition).sum() / np.square(self.deviations).sum())

    @property
    def A(self) -> np.ndarray:
        """[n, n], in the coordinates of the basis."""
        return self.deviations[:, None] * self.transition / self.deviations

    @property
    def P(self) -> np.ndarray:
        """[n, n]: the covariance of x, in the clip and in the model."""
        return np.diag(self.deviations**2)

    @property
    def Q(self) -> np.ndarray:
        """[n, n]: B B' = P - A P A', the covariance of the residuals x(t+1) - A x(t) but for what ends do to it."""
        return self.P - self.A @ self.P @ self.A.T

    def project(self, video: np.ndarray) -> np.ndarray:
        """x [T, n] of frames [T, H, W, C]: C' (y - mean)."""
        if np.shape(video)[1:] != self.mean.shape:
            raise DataError(f"frames must be {list(self.mean.shape)} as the clip's, got {list(np.shape(video)[1:])}")
        return (video - self.mean).reshape(len(video), -1) @ self.basis.reshape(self.states, -1).T

    def render(self, x: np.ndarray) -> np.ndarray:
        """Frames [T, H, W, C] of x [T, n]: mean + C x."""
        return self.mean + np.tensordot(x, self.basis, 1)

    def system(self, speed: float = 1.0) -> LTI:
        """The system whose outputs are x, seen every `speed` frames of the clip; its state is white: covariance I.

        Faster and slower are the power A^speed with B B' = I - A^speed A'^speed, so that P stays. Backwards is the
        reverse model (Lindquist and Picci). A power that is no contraction, as of a few modes of noise when slowed
        down, is made one as in `fit`: then A^(1/2) twice is not all of A.
        """
        if not SLOWEST <= abs(speed) < math.inf:
            raise RealizationError(
                f"speed must be a finite number, at least {SLOWEST:g} or at most -{SLOWEST:g} (0.5 is slower, -1 "
                f"backwards), got {speed:g}"
            )
        left, gains, right = np.linalg.svd(power(self.transition, abs(speed)))
        gains = np.minimum(gains, MEMORY ** abs(speed))
        C = np.zeros((self.states, len(gains)))
        np.fill_diagonal(C, self.deviations)
        system = LTI((left * gains) @ right, (left * np.sqrt(1 - gains**2)) @ left.T, C, np.zeros_like(C))
        return system.reverse() if speed < 0 else system

    def lag_covariances(self, lags: int, speed: float = 1.0) -> np.ndarray:
        """L [lags + 1, n, n], L[h] = E x(t+h) x(t)'; at speed -1 the transposes of those at speed 1."""
        return self.system(speed).covariances(lags)[0]

    def simulate(self, frames: int, speed: float = 1.0, seed: int = 0) -> np.ndarray:
        """x [frames, n] of a new clip, from a stationary state."""
        if not 1 <= frames <= MAX_FRAMES:
            raise RealizationError(f"frames must be from 1 to {MAX_FRAMES:,}, got {frames:,}")
        system = self.system(speed)
        start = np.random.default_rng([whole("seed", seed, 0), 1]).standard_normal(len(system.A))  # its covariance is I
        return system.simulate(frames, seed, start=start)

    def stream(self, frames: int, speed: float = 1.0, seed: int = 0) -> Iterator[np.ndarray]:
        """New frames [H, W, C] in 0..1, one by one; see `synthesize`."""
        return (np.clip(self.render(x[None])[0], 0, 1) for x in self.simulate(frames, speed, seed))

    def synthesize(self, frames: int, speed: float = 1.0, seed: int = 0) -> np.ndarray:
        """New frames [frames, H, W, C] in 0..1, from a stationary state: each `speed` frames of the clip on.

        speed: 1 as in the clip, 0.5 half as fast, -1 backwards, any number not nearer to 0 than
        1e-6. Frames are without the noise w(t).
        """
        return np.stack(list(self.stream(frames, speed, seed)))

    def save(self, path: str | Path) -> int:
        """Writes one safetensors file, whole or not at all; returns its bytes."""
        about = {"format": FORMAT, **{name: json.dumps(getattr(self, name)) for name in NUMBERS}}
        content = save({name: getattr(self, name) for name in ARRAYS}, metadata=about)
        write_whole(Path(path), content)
        return len(content)

    @classmethod
    def load(cls, path: str | Path) -> DynamicTexture:
        """What `save` wrote. Raises CheckpointError if it is missing, damaged, or no texture."""
        if not Path(path).is_file():
            raise CheckpointError(f"no file {path}; bmojo texture fit VIDEO -o {path} makes one")
        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise CheckpointError(f"{path} is no texture: its format is {about.get('format')}, not {FORMAT}")
                fields: dict[str, Any] = {name: file.get_tensor(name) for name in ARRAYS}
                fields |= {name: json.loads(about[name]) for name in NUMBERS}
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no texture, or damaged: {error}; fit it again") from error
        texture = cls(**fields)
        n, frame = texture.states, texture.mean.shape
        if texture.basis.shape != (n, *frame) or texture.transition.shape != (n, n) or len(frame) != 3:
            raise CheckpointError(f"{path} is damaged: its arrays do not fit one another; fit it again")
        return texture


def least_squares(x: np.ndarray) -> np.ndarray:
    """A [n, n] = X_2 X_1^+, the least-squares fit of x(t+1) = A x(t) to x [n, T]; the exact DMD's operator."""
    return np.linalg.lstsq(x[:, :-1].T, x[:, 1:].T, rcond=None)[0].T


def power(A: np.ndarray, exponent: float) -> np.ndarray:
    """A^exponent, real, for exponent > 0: each mode r e^(i a), |a| <= pi, to r^exponent e^(i a exponent).

    Of a negative eigenvalue -r, a mode at half the frame rate, no power but the whole ones is real: it takes the
    place of a pair r e^(+-i pi), whose second state, appended to those of A, is new and unseen. [n, n] for a whole
    exponent, else [n + k, n + k] for k negative eigenvalues; in either case A^(1/2) A^(1/2) has A as its first block.
    Raises RealizationError where the modes are so nearly parallel that the condition number is above 1e8.
    """
    if float(exponent).is_integer():
        return np.linalg.matrix_power(A, int(exponent))
    values, vectors = np.linalg.eig(A)
    if (condition := np.linalg.cond(vectors)) > MAX_CONDITION:
        raise RealizationError(
            f"the modes have condition number {condition:.2g}, above {MAX_CONDITION:.0e}: a power that is not whole "
            "would not be accurate; use a whole speed, or fewer states"
        )
    n, flips = len(A), np.flatnonzero((values.imag == 0) & (values.real < 0))
    modes = np.diag(np.append(np.abs(values) ** exponent * np.exp(1j * exponent * np.angle(values)), 0 * flips))
    basis = np.eye(len(modes), dtype=complex)
    basis[:n, :n] = vectors
    cos, sin = math.cos(math.pi * exponent), math.sin(math.pi * exponent)
    for new, old in enumerate(flips.tolist(), n):
        modes[np.ix_([old, new], [old, new])] = abs(values[old]) ** exponent * np.array([[cos, -sin], [sin, cos]])
    return (basis @ modes @ np.linalg.inv(basis)).real


def _radius(A: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvals(A)).max())
