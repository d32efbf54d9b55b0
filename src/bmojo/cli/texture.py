"""`bmojo texture fit|synthesize`: dynamic textures, moving scenes as a linear system, and new ones out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bmojo.cli.options import Seed
from bmojo.errors import ConfigError
from bmojo.tables import size_text


def fit(
    video: Annotated[Path, typer.Argument(help="A video file, a .gif, or a folder of .png or .jpg frames.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="MODEL", help="The file to write; VIDEO.texture, here, if left out."),
    ] = None,
    states: Annotated[int, typer.Option(min=1, help="Numbers that a moment of the scene is described by.")] = 20,
    size: Annotated[
        int, typer.Option(min=0, help="Scale frames down until no side is longer; 0 keeps them as they are.")
    ] = 160,
    max_frames: Annotated[int | None, typer.Option(min=2, help="Read no more than the first so many.")] = None,
    gray: Annotated[bool, typer.Option("--gray", help="Without colour.")] = False,
    fps: Annotated[float | None, typer.Option(help="Frames a second; as in the file if left out.")] = None,
) -> None:
    from bmojo.realize.texture import DynamicTexture
    from bmojo.realize.video import VIDEOS, read_video

    out = Path(f"{video.resolve().stem}.texture") if out is None else out
    if out.suffix.lower() in (*VIDEOS, ".gif"):
        raise ConfigError(f"--out takes the file of the texture, got the name of a video, {out}")
    clip = read_video(video, size=size or None, max_frames=max_frames, gray=gray)
    texture = DynamicTexture.fit(clip.frames, states, clip.fps if fps is None else fps)
    written = texture.save(out)
    print(f"{video}: {texture.clip_frames:,} frames, {texture.size}, {texture.fps:g} a second")
    left, floor, next_frame = texture.relative_error, texture.noise_floor, texture.predicted
    print(f"{states} states leave {left:.3f} of the motion: a noise floor of {floor:.4f} (brightness is 0 to 1)")
    print(f"each frame says {next_frame:.1%} of the motion in the next one")
    print(f"spectral radius {texture.radius:.5f} (by least squares alone {texture.least_squares_radius:.5f})")
    print(f"{out}: {size_text(written)}; bmojo texture synthesize {out} --frames 200 -o new.mp4")


def synthesize(
    model: Annotated[Path, typer.Argument(help="What `bmojo texture fit` wrote.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="OUT.mp4, OUT.gif, or a new folder for .png frames.")
    ],
    frames: Annotated[int, typer.Option(min=1, help="How many frames to make.")] = 200,
    speed: Annotated[float, typer.Option(help="0.5 is half as fast as the clip, 2 twice, -1 backwards.")] = 1.0,
    seed: Seed = 0,
    fps: Annotated[float | None, typer.Option(help="Frames a second; as in the clip if left out.")] = None,
) -> None:
    from rich.console import Console
    from rich.progress import track

    from bmojo.realize.texture import DynamicTexture
    from bmojo.realize.video import write_video

    texture = DynamicTexture.load(model)
    console = Console(stderr=True)
    stream = track(
        texture.stream(frames, speed, seed),
        description="frames",
        total=frames,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    written = write_video(out, stream, texture.fps if fps is None else fps)
    print(f"{out}: {frames:,} frames, {texture.size}, at speed {speed:g}, seed {seed}; {size_text(written)}")
