"""Videos as arrays: files that ffmpeg reads, `.gif`, and folders of frames.

frames [T, H, W, C] float64 in 0..1, C = 1 (gray) or 3 (red, green, blue); fps: frames a second.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bmojo.errors import BMojoError, DataError
from bmojo.files import full_disk_told, optional_module, write_whole

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")
IMAGES = (".png", ".jpg", ".jpeg")
MAX_BYTES = 1 << 30
DEFAULT_FPS = 25.0


class Video(NamedTuple):
    frames: np.ndarray
    fps: float


def read_video(
    path: str | Path, *, size: int | None = None, max_frames: int | None = None, gray: bool = False
) -> Video:
    """The frames of a video file, a `.gif`, or a folder of `.png` and `.jpg` in natural order (2 before 10).

    size: frames are scaled down, as they are read, until no side is longer, to even sides. max_frames: no more are
    read. gray: the luminance only, which a video becomes anyway if all its frames are gray. What tells no rate has 25
    frames a second.
    Raises DataError if it is missing, unreadable, no video, has fewer than two frames or frames of different sizes,
    or takes more than 1 GiB.
    """
    path = Path(path)
    for name, value in (("size", size), ("max_frames", max_frames)):
        if value is not None and value < 2:
            raise DataError(f"{name} must be at least 2, got {value}")
    image = optional_module("PIL.Image", "reading a video", "texture")
    fps, images = _open(path)
    frames: list[np.ndarray] = []
    first = None
    with closing(images):
        for picture in images:
            first = first or picture.size
            if picture.size != first:
                raise DataError(
                    f"{path}: frame {len(frames)} is {_by(picture.size)}, but frame 0 {_by(first)}; "
                    "make all of one size"
                )
            if size is not None and max(first) > size:
                scaled = [2 * max(1, round(side / max(first) * (size // 2))) for side in first]
                picture = picture.resize(scaled, image.Resampling.BOX)
            pixels = np.asarray(picture.convert("L" if gray else "RGB"))
            frames.append(pixels.reshape(*pixels.shape[:2], -1))
            if len(frames) * frames[-1].size * 8 > MAX_BYTES:
                raise DataError(
                    f"{path}: {len(frames)} frames of {_by(picture.size)}, and there are more, take over "
                    f"{MAX_BYTES >> 30} GiB; read fewer (max_frames, --max-frames) or smaller ones (size, --size)"
                )
            if len(frames) == max_frames:
                break
    if len(frames) < 2:
        raise DataError(f"a video needs at least 2 frames, got {len(frames)} of {path}")
    video = np.stack(frames)
    if video.shape[-1] == 3 and (video == video[..., :1]).all():
        video = video[..., :1]
    return Video(video / 255.0, fps)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float = DEFAULT_FPS) -> int:
    """Writes frames [H, W, C] as `.mp4` (H.264), as `.gif` (a loop), or as PNGs in a new folder; whole or not at all.

    Values are cut to 0..1 and rounded to 8 bits. An `.mp4` has even sides: the last row or column of odd ones is
    repeated. A `.gif` counts time in 1/100 s, and its rate is the nearest that does, at most 50 a second; both are
    warned of. A folder must be new or empty, or frames of old videos would mix with these. Returns the bytes written.
    Raises DataError if the frames are no images of one size, BMojoError if they can't be written.
    """
    path = Path(path)
    if not 0 < fps <= 1000:
        raise DataError(f"fps must be above 0 and at most 1000, got {fps}")
    make = {".mp4": _write_mp4, ".gif": _write_gif, "": _write_folder}.get(path.suffix.lower())
    if make is None:
        raise DataError(f"can't write {path.name}: expected a name in .mp4 or .gif, or of a folder, without a dot")
    if path.suffix and path.is_dir():
        raise DataError(f"{path} is a folder; expected the name of a file, or of a folder, which has no dot")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} is there already and no empty folder; choose another name, or delete it")
    return make(path, _pictures(frames), fps)


def natural(path: Path) -> list[Any]:
    """Sorts names as people do: frame2 before frame10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


# in
def _open(path: Path) -> tuple[float, Any]:
    """Frames a second, and a generator of the frames as PIL images."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGES), key=natural)
        if not files:
            raise DataError(f"the folder {path} holds no frames: expected files in {', '.join(IMAGES)}")
        return DEFAULT_FPS, _images(files)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if path.suffix.lower() == ".gif":
        return _gif(path)
    if path.suffix.lower() in VIDEOS:
        return _ffmpeg(path)
    raise DataError(f"{path} is no video: expected .gif, one of {', '.join(VIDEOS)}, or a folder of frames")


def _images(files: list[Path]) -> Iterator[Any]:
    image = optional_module("PIL.Image", "reading frames", "texture")
    for file in files:
        with _readable(file), image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"{file} has pixels of more than 8 bits (mode {picture.mode}); expected 8 bits")
            yield picture


def _gif(path: Path) -> tuple[float, Iterator[Any]]:
    with _readable(path):
        picture = optional_module("PIL.Image", "reading a .gif", "texture").open(path)
        sequence = optional_module("PIL.ImageSequence", "reading a .gif", "texture").Iterator(picture)

    def frames() -> Iterator[Any]:
        with picture, _readable(path):
            for frame in sequence:
                yield frame.convert("RGB")

    return 1000 / (picture.info.get("duration") or 100), frames()


def _ffmpeg(path: Path) -> tuple[float, Iterator[Any]]:
    image = optional_module("PIL.Image", "reading a video", "texture")
    ffmpeg = optional_module("imageio_ffmpeg", "reading a video", "texture")
    # a playlist in the file could otherwise have ffmpeg open other hosts, and a colon in a name means a protocol
    reader = ffmpeg.read_frames(f"file:{path}", input_params=["-protocol_whitelist", "file,pipe"])
    with _readable(path):
        meta = next(reader)

    def frames() -> Iterator[Any]:
        with closing(reader), _readable(path):
            for content in reader:
                yield image.frombytes("RGB", meta["size"], content)

    return meta["fps"] or DEFAULT_FPS, frames()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises of `path` into one line."""
    try:
        yield
    except BMojoError:
        raise
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(
            f"{path} can't be read as {'a video' if path.suffix.lower() in VIDEOS else 'images'}: {why}"
        ) from error


# out
def _pictures(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8 [H, W, 1 or 3], all of the first one's shape."""
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        frame = np.asarray(frame, dtype=float)
        shape = shape or frame.shape
        if frame.shape != shape or len(shape) != 3 or 0 in shape or shape[2] not in (1, 3):
            raise DataError(
                f"frame {number} has shape {list(frame.shape)}; expected [height, width, 1 or 3], all as the first"
            )
        if not np.isfinite(frame).all():
            raise DataError(f"frame {number} has nan or inf; expected numbers from 0 to 1")
        yield np.round(255 * np.clip(frame, 0, 1)).astype(np.uint8)
    if shape is None:
        raise DataError("there is no frame to write")


def _write_mp4(path: Path, pictures: Iterator[np.ndarray], fps: float) -> int:
    program = optional_module("imageio_ffmpeg", "writing an .mp4", "texture").get_ffmpeg_exe()
    first = next(pictures)
    height, width = (side + side % 2 for side in first.shape[:2])
    if (height, width) != first.shape[:2]:
        warnings.warn(f"an .mp4 has even sides: {_by((width, height))}, the last row or column repeated", stacklevel=3)
    odd = ((0, height - first.shape[0]), (0, width - first.shape[1]), (0, 0))
    raw = ["-f", "rawvideo", "-pix_fmt", "gray" if first.shape[2] == 1 else "rgb24", "-s", f"{width}x{height}"]
    h264 = ["-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p"]
    with tempfile.TemporaryDirectory() as work, (Path(work) / "errors").open("w+") as errors:
        file = Path(work) / "video.mp4"
        rate = str(Fraction(fps).limit_denominator(1001))
        command = [program, "-v", "error", *raw, "-r", rate, "-i", "-", *h264, str(file)]
        encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, process_group=0)
        with suppress(BrokenPipeError), encoder:  # if the pipe breaks, it has ended, and said why
            try:
                for picture in chain([first], pictures):
                    encoder.stdin.write(np.pad(picture, odd, mode="edge").tobytes())  # type: ignore[union-attr]
            except BaseException:
                encoder.kill()
                raise
        if encoder.returncode != 0:
            errors.seek(0)
            said = (errors.read().strip() or f"exit code {encoder.returncode}").splitlines()[-1]
            raise BMojoError(f"ffmpeg can't encode {path}: {said}")
        content = file.read_bytes()
    write_whole(path, content)
    return len(content)


def _write_gif(path: Path, pictures: Iterator[np.ndarray], fps: float) -> int:
    images, held = [], 0
    for picture in pictures:
        images.append(_image(picture))
        held += picture.size
        if held > MAX_BYTES:
            raise DataError(f"{path}: more than {MAX_BYTES >> 30} GiB of pixels in a .gif; write fewer, or an .mp4")
    content = BytesIO()
    hundredths = max(2, round(100 / fps))
    if abs(fps * hundredths / 100 - 1) > 0.01:
        warnings.warn(
            f"a .gif counts time in 1/100 s: {100 / hundredths:.3g} frames a second, not {fps:g}", stacklevel=3
        )
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=10 * hundredths, loop=0)
    write_whole(path, content.getvalue())
    return content.tell()


def _write_folder(path: Path, pictures: Iterator[np.ndarray], fps: float) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with full_disk_told(path.parent):
            for number, picture in enumerate(pictures):
                _image(picture).save(work / f"{number:06d}.png")
        work.chmod(0o755)
        size = sum(file.stat().st_size for file in work.iterdir())
        work.rename(path)
    except BaseException:
        shutil.rmtree(work)
        raise
    return size


def _image(picture: np.ndarray) -> Any:
    image = optional_module("PIL.Image", "writing frames", "texture")
    return image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
