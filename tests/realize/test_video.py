"""Videos in and out: the array that comes back, what is refused, and that nothing is half-written."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bmojo.errors import BMojoError, DataError, MissingPackageError
from bmojo.realize import video as module
from bmojo.realize.video import read_video, write_video


def moving(channels: int = 3, frames: int = 12, height: int = 20, width: int = 30) -> np.ndarray:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    gray = 0.5 + 0.4 * np.cos(2 * np.pi * (x / width + y / height - t / frames))
    return gray[..., None] * np.array([1.0, 0.6, 0.3])[:channels]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "tolerance", "fps"), [("v.mp4", 0.03, 20), ("v.gif", 0.5 / 255, 20), ("v", 0.5 / 255, 25)]
)
def test_what_is_written_comes_back(tmp_path, channels, name, tolerance, fps):
    frames = moving(channels)
    size = write_video(tmp_path / name, frames, fps=20)
    back = read_video(tmp_path / name)
    assert back.fps == pytest.approx(fps)
    assert back.frames.dtype == np.float64
    assert back.frames.shape == frames.shape
    error = np.abs(back.frames - frames)
    assert np.sqrt(np.square(error).mean()) < tolerance
    if name != "v.mp4":
        assert error.max() <= tolerance + 1e-12
    path = tmp_path / name
    assert size == (sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size)


def test_odd_sides_of_an_mp4_are_repeated(tmp_path):
    frames = moving(1, height=21, width=31)
    with pytest.warns(UserWarning, match="an .mp4 has even sides: 32 x 22"):
        write_video(tmp_path / "odd.mp4", frames)
    back = read_video(tmp_path / "odd.mp4").frames
    assert back.shape == (12, 22, 32, 1)
    assert np.abs(back[:, :21, :31] - frames).max() < 0.06


def test_values_are_cut_to_what_a_pixel_can_be(tmp_path):
    frames = np.stack([np.full((4, 4, 1), value) for value in (-0.5, 0.0, 0.5, 2.0)])
    write_video(tmp_path / "v", frames)
    assert [read_video(tmp_path / "v").frames[i].max() for i in range(4)] == [0, 0, 128 / 255, 1]


def test_folders_are_read_in_natural_order(tmp_path):
    for number in (10, 9, 1, 100):
        Image.fromarray(np.full((2, 2), number, np.uint8)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = read_video(tmp_path).frames
    assert (255 * frames[:, 0, 0, 0]).round().tolist() == [1, 9, 10, 100]


def test_size_frames_and_gray(tmp_path):
    frames = moving(3, height=20, width=40)
    write_video(tmp_path / "v", frames)
    small = read_video(tmp_path / "v", size=8, max_frames=5, gray=True).frames
    assert small.shape == (5, 4, 8, 1)
    luminance = frames[:5] @ np.array([0.299, 0.587, 0.114])
    expected = luminance.reshape(5, 4, 5, 8, 5).mean((2, 4))  # each pixel the mean of those it takes the place of
    assert np.abs(small[..., 0] - expected).max() < 1.5 / 255
    assert read_video(tmp_path / "v", size=17).frames.shape == (12, 8, 16, 3)  # even sides
    assert read_video(tmp_path / "v", size=100).frames.shape == (12, 20, 40, 3)  # never scaled up


def test_the_rate_of_a_gif_is_the_nearest(tmp_path):
    with pytest.warns(UserWarning, match=r"a \.gif counts time in 1/100 s: 33.3 frames a second, not 30"):
        write_video(tmp_path / "v.gif", moving(), fps=30)
    assert read_video(tmp_path / "v.gif").fps == pytest.approx(100 / 3)


def test_a_color_image_among_gray_ones_keeps_the_color(tmp_path):
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(np.full((2, 2, 3), (9, 8, 7), np.uint8)).save(tmp_path / "1.png")
    frames = read_video(tmp_path).frames
    assert (255 * frames[:, 0, 0]).round().tolist() == [[9, 9, 9], [9, 8, 7]]


def test_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:a.mp4", "-i %03d.mp4"):
        write_video(name, moving())
        assert read_video(name).frames.shape == (12, 20, 30, 3)


class TestRefused:
    def refused(self, path, match, **options):
        with pytest.raises(DataError, match=match) as caught:
            read_video(path, **options)
        assert "\n" not in str(caught.value)

    def test_what_is_not_there_or_empty(self, tmp_path):
        self.refused(tmp_path / "none.mp4", "no such file or folder: .*none.mp4")
        self.refused(tmp_path, r"holds no frames: expected files in \.png")
        for name in ("v.mp4", "v.gif"):
            (tmp_path / name).touch()
            self.refused(tmp_path / name, f"{name} is empty")

    @pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.avi"])
    def test_what_is_no_video(self, tmp_path, name):
        (tmp_path / name).write_text("A text is no video.\n" * 100)
        self.refused(tmp_path / name, f"{name} can't be read as")

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "v.txt").write_text("ffmpeg would draw this text\n" * 100)
        self.refused(tmp_path / "v.txt", r"is no video: expected \.gif, one of \.mp4,")

    def test_sound_only(self, tmp_path):
        source = ["-f", "lavfi", "-i", "sine=d=0.2"]
        subprocess.run(
            [module.optional_module("imageio_ffmpeg", "").get_ffmpeg_exe(), "-v", "error", *source, tmp_path / "v.mp4"],
            check=True,
        )
        self.refused(tmp_path / "v.mp4", "v.mp4 can't be read as a video")

    @pytest.mark.parametrize("name", ["v.mp4", "v.gif"])
    def test_a_damaged_file(self, tmp_path, name):
        write_video(tmp_path / name, moving())
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        self.refused(tmp_path / name, f"{name} can't be read as")

    def test_a_damaged_frame_is_named(self, tmp_path):
        write_video(tmp_path / "v", moving())
        (tmp_path / "v" / "000007.png").write_bytes(b"\x89PNG")
        self.refused(tmp_path / "v", "000007.png can't be read")

    def test_one_frame(self, tmp_path):
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "0.png")
        self.refused(tmp_path, "at least 2 frames, got 1 ")
        write_video(tmp_path / "v.mp4", moving()[:1])
        self.refused(tmp_path / "v.mp4", "at least 2 frames, got 1 ")

    def test_frames_of_two_sizes(self, tmp_path):
        for number, width in enumerate((2, 2, 3)):
            Image.fromarray(np.zeros((4, width), np.uint8)).save(tmp_path / f"{number}.png")
        self.refused(tmp_path, "frame 2 is 3 x 4, but frame 0 2 x 4")

    def test_sixteen_bits(self, tmp_path):
        for number in range(2):
            Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / f"{number}.png")
        self.refused(tmp_path, "0.png has pixels of more than 8 bits")

    def test_too_much(self, tmp_path, monkeypatch):
        write_video(tmp_path / "v", moving())
        monkeypatch.setattr(module, "MAX_BYTES", 20 * 30 * 3 * 8 * 3)
        self.refused(tmp_path / "v", r"4 frames of 30 x 20, .* --max-frames\) or smaller ones \(size, --size\)")
        assert len(read_video(tmp_path / "v", max_frames=3).frames) == 3
        assert len(read_video(tmp_path / "v", size=15).frames) == 12

    @pytest.mark.parametrize(("package", "name"), [("imageio_ffmpeg", "v.mp4"), ("PIL.Image", "v.gif")])
    def test_without_the_extra(self, tmp_path, monkeypatch, package, name):
        write_video(tmp_path / name, moving())
        monkeypatch.setitem(sys.modules, package, None)
        for use in (lambda: read_video(tmp_path / name), lambda: write_video(tmp_path / name, moving())):
            with pytest.raises(MissingPackageError, match=r"needs the package .*: pip install 'bmojo\[texture\]'"):
                use()

    @pytest.mark.parametrize("options", [{"size": 0}, {"max_frames": -1}])
    def test_options(self, tmp_path, options):
        self.refused(tmp_path, f"{next(iter(options))} must be at least 2", **options)


class TestRefusedToWrite:
    @pytest.mark.parametrize(
        ("frames", "match"),
        [
            ([], "no frame to write"),
            (np.zeros((2, 4, 4)), r"frame 0 has shape \[4, 4\]"),
            (np.zeros((2, 4, 4, 2)), r"frame 0 has shape \[4, 4, 2\]"),
            ([np.zeros((4, 4, 1)), np.zeros((4, 6, 1))], r"frame 1 has shape \[4, 6, 1\]"),
            (np.full((2, 4, 4, 1), np.nan), "frame 0 has nan"),
        ],
    )
    @pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v"])
    def test_what_are_no_frames(self, tmp_path, name, frames, match):
        with pytest.raises(DataError, match=match):
            write_video(tmp_path / name, frames)
        assert list(tmp_path.iterdir()) == []

    def test_names_and_rates(self, tmp_path):
        for name, fps, match in [
            ("v.avi", 25, "expected a name in .mp4"),
            ("v.mp4", 0, "fps"),
            ("v.mp4", np.nan, "fps"),
        ]:
            with pytest.raises(DataError, match=match):
                write_video(tmp_path / name, moving(), fps)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        (tmp_path / "folder.mp4").mkdir()
        for name in ("full", "folder.mp4"):
            with pytest.raises(DataError, match=r"is a folder|no empty folder"):
                write_video(tmp_path / name, moving())

    def test_too_much_for_a_gif(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "MAX_BYTES", 20 * 30 * 3 * 11)
        with pytest.raises(DataError, match=r"pixels in a \.gif; write fewer, or an \.mp4"):
            write_video(tmp_path / "v.gif", moving())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v"])
    def test_stopped_half_way_nothing_is_left(self, tmp_path, monkeypatch, name):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(module.tempfile, "tempdir", None)

        def frames():
            yield from moving()[:5]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_video(tmp_path / name, frames())
        assert list(tmp_path.iterdir()) == []

    def test_an_encoder_that_fails_is_one_line(self, tmp_path, monkeypatch):
        program = tmp_path / "ffmpeg"
        program.write_text("#!/bin/sh\necho first line >&2\necho no space left >&2\nexit 3\n")
        program.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.fspath(program))
        with pytest.raises(BMojoError, match=r"ffmpeg can't encode .*v.mp4: no space left$"):
            write_video(tmp_path / "v.mp4", np.zeros((40, 200, 200, 3)))
        assert not (tmp_path / "v.mp4").exists()
