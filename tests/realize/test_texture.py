"""Dynamic textures: what a fit keeps of a clip, what a synthesis keeps of the fit, at every speed."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.linalg import fractional_matrix_power

from bmojo.errors import CheckpointError, DataError, RealizationError
from bmojo.realize import LTI
from bmojo.realize.clips import wave
from bmojo.realize.texture import ARRAYS, MEMORY, NUMBERS, DynamicTexture, least_squares, power

NOISE = 0.01
SPEEDS = st.floats(-5, 5).filter(lambda speed: abs(speed) > 0.01) | st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0])


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return wave(noise=NOISE)


@pytest.fixture(scope="module")
def texture(clip) -> DynamicTexture:
    return DynamicTexture.fit(clip, 20)


def random_clip(seed: int, states: int = 6, frames: int = 40, radius: float | None = None) -> np.ndarray:
    """Random images that come and go; negative eigenvalues are as likely as positive ones."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((states, states))
    A *= (radius or rng.uniform(0.3, 0.99)) / np.abs(np.linalg.eigvals(A)).max()
    x = LTI(A, np.eye(states), np.eye(states), np.zeros((states, states))).simulate(frames, seed)
    clip = x @ rng.standard_normal((states, 30))
    return (0.5 + 0.45 * clip / np.abs(clip).max()).reshape(frames, 5, 6, 1)


def random_texture(seed: int) -> DynamicTexture:
    return DynamicTexture.fit(random_clip(seed), 6)


def turning(texture: DynamicTexture) -> DynamicTexture:
    """With two modes that turn, and neither mix nor grow: every power is a contraction."""
    transition = np.zeros((4, 4))
    for first, r, angle in ((0, 0.9, 0.5), (2, 0.7, 2.0)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        transition[first : first + 2, first : first + 2] = r * turn
    return dataclasses.replace(texture, transition=transition)


def relative(A: np.ndarray, B: np.ndarray) -> float:
    return float(np.linalg.norm(A - B) / np.linalg.norm(B))


class TestFit:
    def test_a_wave_is_reconstructed_to_its_noise(self, clip, texture):
        """By 20 states: what is left is the noise, less the share (1 - n/p)(1 - n/(T-1)) of its energy that n of its
        own directions carry, and a little more as the n largest are taken. By Eckart and Young no 20 leave less."""
        p, T, n = clip[0].size, len(clip), 20
        rest = clip - texture.render(texture.project(clip))
        assert math.sqrt(np.square(rest).mean()) == pytest.approx(texture.noise_floor, rel=1e-9)
        assert np.linalg.norm(rest) / np.linalg.norm(clip - clip.mean(0)) == pytest.approx(texture.relative_error)
        floor = NOISE * math.sqrt((1 - n / p) * (1 - n / (T - 1)))
        assert texture.noise_floor == pytest.approx(floor, rel=0.03)
        assert texture.relative_error == pytest.approx(floor / math.sqrt(0.2**2 / 2 + 0.1**2 / 2 + NOISE**2), rel=0.03)
        clean = wave(noise=0)
        through = np.square(texture.render(texture.project(clip)) - clean).mean()
        assert through + texture.noise_floor**2 == pytest.approx(NOISE**2, rel=0.03)  # nothing of the wave is lost

    def test_without_noise_four_states_are_exact(self):
        clean = wave(noise=0)
        texture = DynamicTexture.fit(clean, 4)
        assert texture.relative_error < 1e-12
        assert np.abs(texture.render(texture.project(clean)) - clean).max() < 1e-12
        angles = np.angle(np.linalg.eigvals(texture.A)) / (2 * np.pi)
        assert np.sort(np.abs(angles)) == pytest.approx([1 / 12, 1 / 12, 1 / 7.3, 1 / 7.3], rel=2e-3)

    @pytest.mark.parametrize(("frames", "size"), [(40, 8), (400, 8), (64, 8)])
    def test_clips_of_more_frames_than_pixels(self, frames, size):
        clip = wave(frames, size)
        texture = DynamicTexture.fit(clip, 5)
        basis = texture.basis.reshape(5, -1)
        assert basis @ basis.T == pytest.approx(np.eye(5), abs=1e-12)
        values = np.linalg.svd((clip - clip.mean(0)).reshape(frames, -1))[1]
        assert texture.deviations == pytest.approx(values[:5] / math.sqrt(frames))
        assert texture.noise_floor == pytest.approx(np.linalg.norm(values[5:]) / math.sqrt(clip.size))
        x = texture.project(clip)
        assert x.T @ x / frames == pytest.approx(texture.P, abs=1e-12)

    def test_its_stationary_covariance_is_the_clips(self, clip, texture):
        x = texture.project(clip)
        assert x.T @ x / len(x) == pytest.approx(texture.P, abs=1e-12)
        assert np.abs(texture.A @ texture.P @ texture.A.T + texture.Q - texture.P).max() < 1e-12
        assert np.linalg.eigvalsh(texture.Q)[0] > 0
        assert np.linalg.svd(texture.transition)[1].max() <= MEMORY + 1e-12
        assert texture.radius < 1

    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_nearly_least_squares(self, seed):
        """It predicts the next frame as well, and Q is the covariance of what it does not predict."""
        clip = random_clip(seed, frames=2000)
        texture = DynamicTexture.fit(clip, 6)
        x = texture.project(clip).T
        errors, best = x[:, 1:] - texture.A @ x[:, :-1], x[:, 1:] - least_squares(x) @ x[:, :-1]
        assert np.linalg.norm(errors) == pytest.approx(np.linalg.norm(best), rel=1e-3)
        assert relative(texture.A, least_squares(x)) < 0.01
        assert relative(errors @ errors.T / len(x.T), texture.Q) < 0.01

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10**6), st.integers(1, 6), st.integers(9, 60))
    def test_least_squares_is_a_contraction_but_for_one_direction(self, seed, states, frames):
        x = np.linalg.qr(random_clip(seed, states, frames).reshape(frames, -1) - 0.5)[0][:, :states]
        gains = np.linalg.svd(least_squares(x.T))[1]  # where X X' = I
        assert np.count_nonzero(gains > 1 + 1e-9) <= 1

    def test_a_clip_that_grows_gives_a_stable_texture(self):
        t = np.arange(60)[:, None, None, None]
        images = np.random.default_rng(0).standard_normal((2, 8, 8, 1))
        clip = 0.5 + 0.001 * 1.06**t * (np.cos(t) * images[0] + np.sin(t) * images[1])
        texture = DynamicTexture.fit(clip, 2)
        assert texture.least_squares_radius == pytest.approx(1.06, abs=0.01)
        assert texture.radius < 1
        assert texture.system().stationary == pytest.approx(np.eye(2), abs=1e-9)

    def test_least_squares_is_the_exact_dmd(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydmd import DMD
        rng = np.random.default_rng(0)
        clip = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 7 * 9))
        x = np.linalg.svd(clip.T, full_matrices=False)[2][:5] * 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dmd = DMD(svd_rank=5, exact=True).fit(x)
            of_frames = DMD(svd_rank=5, exact=True).fit(clip.T)
        basis = np.linalg.svd(x[:, :-1], full_matrices=False)[0]  # DMD's own coordinates
        A = least_squares(x)
        assert basis.T @ A @ basis == pytest.approx(dmd.operator.as_numpy_array, abs=1e-10)
        expected = np.sort_complex(np.linalg.eigvals(A))
        assert np.sort_complex(dmd.eigs) == pytest.approx(expected, abs=1e-10)
        assert np.sort_complex(of_frames.eigs) == pytest.approx(expected, abs=1e-10)


class TestRefused:
    @pytest.mark.parametrize(
        ("video", "states", "error", "match"),
        [
            (np.zeros((9, 4, 4)), 2, DataError, r"\[frames, height, width, 1 or 3\], got \[9, 4, 4\]"),
            (np.zeros((9, 4, 4, 2)), 2, DataError, "height, width, 1 or 3"),
            (np.zeros((0, 4, 4, 1)), 2, DataError, "height, width, 1 or 3"),
            (np.full((9, 4, 4, 1), np.nan), 2, DataError, r"must be in 0 ... 1, got nan"),
            ((255 * wave(9, 8)).round(), 2, DataError, r"must be in 0 ... 1, got \d+ to \d+; divide bytes by 255"),
            ("clip.mp4", 2, RealizationError, "a video must be real numbers"),
            (np.full((9, 4, 4, 1), 0.3), 2, RealizationError, "nothing moves in this video"),
            (wave(9, 8), 0, RealizationError, "states must be a whole number of at least 1, got 0"),
            (wave(9, 8), 2.5, RealizationError, "states must be a whole number of at least 1, got 2.5"),
            (wave(9, 8), 8, DataError, r"8 states need at least 10 frames, got 9; use at most 7 \(--states\)"),
            (wave(2, 8), 1, DataError, "1 states need at least 3 frames, got 2; a longer clip"),
            (wave(30, 8, noise=0), 6, RealizationError, "only 4 states can be told .* use at most 4"),
        ],
    )
    def test_clips(self, video, states, error, match):
        with pytest.raises(error, match=match):
            DynamicTexture.fit(video, states)

    @pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
    def test_rates(self, clip, fps):
        with pytest.raises(DataError, match="fps must be"):
            DynamicTexture.fit(clip, fps=fps)

    @pytest.mark.parametrize("speed", [0, 1e-9, math.nan, math.inf, -math.inf])
    def test_speeds(self, texture, speed):
        with pytest.raises(RealizationError, match="speed must be a finite number, at least 1e-06"):
            texture.synthesize(3, speed)

    @pytest.mark.parametrize("frames", [0, -1, 100_001])
    def test_numbers_of_frames(self, texture, frames):
        with pytest.raises(RealizationError, match="frames must be from 1 to 100,000"):
            texture.synthesize(frames)

    def test_seeds(self, texture):
        with pytest.raises(RealizationError, match="seed must be a whole number of at least 0, got -1"):
            texture.synthesize(3, seed=-1)

    def test_frames_of_another_size(self, texture):
        with pytest.raises(DataError, match=r"frames must be \[64, 64, 1\] as the clip's, got \[8, 8, 1\]"):
            texture.project(wave(3, 8))


class TestSpeed:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10**6), SPEEDS)
    def test_every_speed_keeps_the_covariance_of_a_frame(self, seed, speed):
        texture = random_texture(seed)
        system = texture.system(speed)
        assert system.stationary == pytest.approx(np.eye(len(system.A)), abs=1e-7)
        assert texture.lag_covariances(0, speed)[0] == pytest.approx(texture.P, abs=1e-7 * texture.P.max())

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10**6), SPEEDS)
    def test_backwards_has_the_transposed_covariances(self, seed, speed):
        texture = random_texture(seed)
        forwards, backwards = texture.lag_covariances(4, speed), texture.lag_covariances(4, -speed)
        assert backwards == pytest.approx(forwards.transpose(0, 2, 1), abs=1e-7 * texture.P.max())

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 7]))
    def test_a_whole_speed_skips_frames(self, seed, speed):
        texture = random_texture(seed)
        skipped = texture.lag_covariances(3 * speed)[::speed]
        assert texture.lag_covariances(3, speed) == pytest.approx(skipped, abs=1e-9 * texture.P.max())

    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 10**6), st.integers(1, 7), st.floats(0.05, 3))
    def test_powers_of_a_matrix_add_up(self, seed, n, exponent):
        """Also where eigenvalues are negative, for which a state is appended."""
        A = np.random.default_rng(seed).standard_normal((n, n)) / math.sqrt(n)
        if np.linalg.cond(np.linalg.eig(A)[1]) > 1e4:
            return
        half = power(A, 0.5)
        assert (half @ half)[:n, :n] == pytest.approx(A, abs=1e-9)
        values = np.linalg.eigvals(A)
        assert len(half) == n + np.count_nonzero((values.imag == 0) & (values.real < 0))
        if not exponent.is_integer():
            assert power(A, exponent) @ half == pytest.approx(half @ power(A, exponent), abs=1e-8)

    def test_half_speed_twice_is_the_clips(self):
        texture = turning(DynamicTexture.fit(wave(60, 16), 4))
        half = texture.system(0.5).A
        assert np.abs(half @ half - texture.transition).max() < 1e-12
        assert np.abs(texture.system(1.5).A - half @ half @ half).max() < 1e-12

    def test_half_speed_twice_of_the_noisy_clip(self, texture):
        """16 of its 20 states are noise, whose power is no contraction: weighed by the energy of the states, what is
        changed is small, and the covariances two half steps apart are those one step apart."""
        L, half = texture.lag_covariances(1), texture.lag_covariances(2, 0.5)
        assert relative(half[2], L[1]) < 0.02

    @pytest.mark.parametrize("speed", [0.3, 1.7, 3, -0.3, -1])
    def test_frames_between_frames(self, speed):
        """Two frames h steps apart have the covariance of h * speed frames of the clip, by scipy's powers."""
        texture = turning(DynamicTexture.fit(wave(60, 16), 4))
        scale = np.outer(texture.deviations, texture.deviations)
        for h, L in enumerate(texture.lag_covariances(3, speed)):
            between = fractional_matrix_power(texture.transition, h * abs(speed))
            assert np.abs(L / scale - (between if speed > 0 else between.T)).max() < 1e-10

    def test_parallel_modes_are_refused(self):
        with pytest.raises(RealizationError, match=r"condition number .* above 1e\+08: .* use a whole speed"):
            power(np.array([[0.5, 1.0], [0.0, 0.5]]), 0.5)
        assert power(np.array([[0.5, 1.0], [0.0, 0.5]]), 2.0) == pytest.approx(np.array([[0.25, 1.0], [0.0, 0.25]]))


class TestSynthesis:
    def test_long_syntheses_have_the_covariances_of_the_model(self):
        """Also of frames, and the time of the reversed one runs backwards."""
        texture = DynamicTexture.fit(random_clip(2, states=4, frames=200, radius=0.8), 4)
        scale = np.sqrt(np.outer(np.diag(texture.P), np.diag(texture.P)))
        for speed in (1, -1, 0.5, 2):
            x = texture.project(texture.synthesize(20_000, speed, seed=1))
            L = texture.lag_covariances(2, speed)
            for h in range(3):
                assert np.abs((x[h:].T @ x[: len(x) - h] / (len(x) - h) - L[h]) / scale).max() < 0.05
        turn = texture.lag_covariances(1)[1] / scale
        assert np.abs(turn - turn.T).max() > 0.3  # which way it runs is plain in them

    def test_the_fit_of_a_reversed_clip_is_nearly_the_reversed_fit(self, clip, texture):
        other = DynamicTexture.fit(clip[::-1], 20)
        x, back = texture.basis.reshape(20, -1), other.basis.reshape(20, -1)
        turn = x @ back.T  # the signs of the basis
        L = turn @ other.lag_covariances(1)[1] @ turn.T
        assert relative(L, texture.lag_covariances(1, -1)[1]) < 0.01

    def test_frames(self, texture):
        frames = texture.synthesize(7, 0.5, seed=3)
        assert frames.shape == (7, 64, 64, 1)
        assert 0 <= frames.min() <= frames.max() <= 1
        assert (frames == texture.synthesize(7, 0.5, seed=3)).all()
        assert not (frames == texture.synthesize(7, 0.5, seed=4)).any()
        assert np.stack(list(texture.stream(7, 0.5, seed=3))) == pytest.approx(frames)

    @pytest.mark.parametrize("speed", [1, 0.5, -1])
    def test_a_seed_gives_the_same_frames_after_rounding(self, speed):
        """As on another machine: nothing in a synthesis hangs on the signs of vectors."""
        clip = random_clip(0)
        other = clip * (1 + 1e-13 * np.random.default_rng(1).standard_normal(clip.shape))
        first, second = (DynamicTexture.fit(video, 6).synthesize(20, speed, seed=5) for video in (clip, other))
        assert np.abs(first - second).max() < 1e-9

    def test_color(self):
        clip = wave(60, 16) * np.array([1.0, 0.5, 0.2])
        texture = DynamicTexture.fit(clip, 4)
        frames = texture.synthesize(30)
        assert frames.shape == (30, 16, 16, 3)
        assert np.std(frames[..., 1]) == pytest.approx(np.std(frames[..., 0]) / 2, rel=0.05)


class TestFiles:
    @pytest.mark.parametrize("clip", [wave(40, 32), wave(400, 8)])
    def test_saved_and_loaded(self, clip, tmp_path):
        path, texture = tmp_path / "wave.texture", DynamicTexture.fit(clip, 5)
        assert texture.save(path) == path.stat().st_size
        again = DynamicTexture.load(path)
        for name in ARRAYS:
            assert (getattr(again, name) == getattr(texture, name)).all()
        assert [getattr(again, name) for name in NUMBERS] == [getattr(texture, name) for name in NUMBERS]
        assert (again.synthesize(3, 0.7) == texture.synthesize(3, 0.7)).all()

    def test_what_is_no_texture(self, texture, tmp_path):
        def refused(match):
            with pytest.raises(CheckpointError, match=match) as caught:
                DynamicTexture.load(path)
            assert "\n" not in str(caught.value)

        path = tmp_path / "x.texture"
        refused("no file .*; bmojo texture fit VIDEO -o")
        path.write_bytes(b"not a texture")
        refused("is no texture, or damaged")
        save_file({"mean": np.zeros(3)}, path)
        refused("is no texture: its format is None")
        save_file({"mean": np.zeros(3)}, path, {"format": "bmojo.texture.1"})
        refused("is no texture, or damaged: .*basis")
        texture.save(path)
        path.write_bytes(path.read_bytes()[:-100])
        refused("is no texture, or damaged")
        arrays = {name: getattr(texture, name) for name in ARRAYS} | {"transition": np.zeros((3, 3))}
        save_file(arrays, path, {"format": "bmojo.texture.1", **{name: "1" for name in NUMBERS}})
        refused("its arrays do not fit one another")
