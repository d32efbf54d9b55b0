"""Dynamic textures of clips that suit them and of clips that don't: tables, stills, and an animation.

    python benchmarks/textures.py --clips clips --out docs/results/textures      # after `make clips`

Three scenes made by rule (`bmojo.realize.clips`) and three real clips, no side longer than 80 pixels, 20 states each.

- left: what the states leave of the motion (root mean square over that of y - mean) in the clip itself and, "held
  out", in its last 40 % when they were fitted to its first 60 %, motion counted about that part's mean.
- by least squares: A = X_2 X_1^+ with Q of its residuals, as the paper has it, poles above 0.999 scaled to that. Its
  spectral radius before, and its stationary variance over the clip's, the least and the most of the states'.
- ours: the spectral radius, and the error of predicting x(t+1) over that of least squares.
- half: by how much the covariance two half steps apart differs from that one step apart, relative (Frobenius).
- the animation: stationary, so it is made to loop by a fade of its end into what came before its beginning,
  x(t) = sqrt(a) x(t) + sqrt(1 - a) x(t + N), which has the same covariance.
"""

from __future__ import annotations

import argparse
import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bmojo.files import optional_module, write_whole
from bmojo.realize import clips
from bmojo.realize.lti import LTI
from bmojo.realize.texture import DynamicTexture, least_squares
from bmojo.realize.video import read_video, write_video
from bmojo.train.machine import machine

STATES, SIZE, COLUMNS, LABEL, FADE, SHADES = 20, 80, 8, 90, 12, 23
MADE = {"wave": clips.wave, "water": clips.water, "flame": clips.flame}
REAL = {"bikes": "bikes", "carphone": "carphone_pristine", "rabbit": "bigbuckbunny"}
SPEEDS = {"as fast": 1.0, "half as fast": 0.5, "twice as fast": 2.0, "backwards": -1.0}


def stabilised(A: np.ndarray, most: float = 0.999) -> np.ndarray:
    """A with the poles of modulus above `most` scaled to it, in real Schur form."""
    T, Z = optional_module("scipy.linalg", "this comparison", "realize").schur(A, output="real")
    start = 0
    while start < len(T):
        stop = start + (2 if start + 1 < len(T) and T[start + 1, start] != 0 else 1)
        block = T[start:stop, start:stop]
        block *= min(1.0, most / np.abs(np.linalg.eigvals(block)).max())
        start = stop
    return Z @ T @ Z.T


def measure(name: str, video: np.ndarray, fps: float) -> tuple[dict[str, Any], DynamicTexture]:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        texture = DynamicTexture.fit(video, STATES, fps)
        times.append(time.perf_counter() - begun)
    early = int(0.6 * len(video))
    past = DynamicTexture.fit(video[:early], STATES, fps)
    rest = video[early:] - past.render(past.project(video[early:]))
    held_out = np.linalg.norm(rest) / np.linalg.norm(video[early:] - past.mean)

    x = (texture.project(video) / texture.deviations).T
    A = least_squares(x)
    errors, ours = x[:, 1:] - A @ x[:, :-1], x[:, 1:] - texture.transition @ x[:, :-1]
    noise = np.linalg.cholesky(errors @ errors.T / errors.shape[1])
    P = LTI(stabilised(A), noise, np.eye(STATES), np.zeros_like(noise)).stationary
    scale = texture.deviations[:, None]
    L, half = texture.lag_covariances(1)[1], texture.lag_covariances(2, 0.5)[2]
    cell = {
        "clip": name,
        "frames": len(video),
        "size": texture.size,
        "fps": fps,
        "seconds": float(np.median(times)),
        "left": texture.relative_error,
        "left_held_out": float(held_out),
        "noise_floor": texture.noise_floor,
        "least_squares_radius": texture.least_squares_radius,
        "least_squares_variance": [float(np.diag(P).min()), float(np.diag(P).max())],
        "radius": texture.radius,
        "error_over_least_squares": float(np.linalg.norm(scale * ours) / np.linalg.norm(scale * errors)),
        "half_twice": float(np.linalg.norm(half - L) / np.linalg.norm(L)),
    }
    return cell, texture


def sheet(found: dict[str, tuple[np.ndarray, DynamicTexture]]) -> bytes:
    """Stills, every fourth frame, as a PNG: a row of each clip, and of its synthesis at each speed."""
    image, draw = (optional_module(f"PIL.{name}", "the stills", "texture") for name in ("Image", "ImageDraw"))
    width = LABEL + COLUMNS * max(video.shape[2] for video, _ in found.values())
    rows = []
    for title, (video, texture) in found.items():
        shown = {title: video} | {name: texture.synthesize(4 * COLUMNS, speed) for name, speed in SPEEDS.items()}
        for name, frames in shown.items():
            stills = fewer_shades(np.concatenate(list(frames[: 4 * COLUMNS : 4]), 1) * np.ones(3))
            label = image.new("RGB", (LABEL, len(stills)), "white")
            draw.Draw(label).text((4, len(stills) // 2 - 6), name, fill="black")
            row = np.concatenate((np.asarray(label), 255 * stills), 1)
            gap = 10 if name == [*SPEEDS][-1] else 2
            rows.append(np.pad(row, ((0, gap), (0, width - row.shape[1]), (0, 0)), constant_values=255))
    content = BytesIO()
    image.fromarray(np.concatenate(rows).round().astype(np.uint8)).save(content, "PNG", optimize=True)
    return content.getvalue()


def fewer_shades(scene: np.ndarray) -> np.ndarray:
    """A fraction of the bytes."""
    return np.round(SHADES * np.clip(scene, 0, 1)) / SHADES


def animation(found: dict[str, tuple[np.ndarray, DynamicTexture]], frames: int = 36) -> np.ndarray:
    """Side by side the clip, as fast, half as fast, and backwards; one texture a row."""
    fade = np.sqrt(np.arange(FADE)[:, None] / FADE)
    rows = []
    for video, texture in found.values():
        cells = [video[:frames]]
        for speed in (1.0, 0.5, -1.0):
            x = texture.simulate(frames + FADE, speed, seed=2)
            x[:FADE] = fade * x[:FADE] + np.sqrt(1 - fade**2) * x[frames:]
            cells.append(texture.render(x[:frames]))
        gap = np.ones((frames, video.shape[1], 4, 3))
        rows.append(np.concatenate([part for cell in cells for part in (cell, gap)][:-1], 2))
    return fewer_shades(np.concatenate([rows[0], np.ones((frames, 4, *rows[0].shape[2:])), rows[1]], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="the folder of `make clips`")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    videos = {name: (make(), 25.0) for name, make in MADE.items()}
    videos |= {name: tuple(read_video(options.clips / f"{file}.mp4", size=SIZE)) for name, file in REAL.items()}
    cells, found = [], {}
    for name, (video, fps) in videos.items():
        cell, texture = measure(name, video, fps)
        cells.append(cell)
        found[name] = (video, texture)
    report = {
        "command": f"python benchmarks/textures.py --clips {options.clips} --out {options.out}",
        "machine": machine(), "states": STATES, "seeds": "clips 0, syntheses 0, animation 2", "cells": cells,
    }  # fmt: skip
    heads = ["clip", "frames", "left", "held out", "least squares: radius", "variance", "ours: radius", "error", "half"]
    lines = [f"| {' | '.join(heads)} | fit |", f"| --- |{' ---: |' * len(heads)}"]
    for c in cells:
        low, high = c["least_squares_variance"]
        lines.append(
            f"| {c['clip']} | {c['frames']} of {c['size']} | {c['left']:.3f} | {c['left_held_out']:.3f} | "
            f"{c['least_squares_radius']:.5f} | {low:.2f} to {high:.2f} | {c['radius']:.5f} | "
            f"{c['error_over_least_squares']:.4f} | {c['half_twice']:.4f} | {c['seconds']:.2f} s |"
        )
    table = "\n".join(lines)
    write_whole(options.out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(options.out / "table.md", f"# Dynamic textures of 20 states\n\n{table}\n".encode())
    made, real = ({name: found[name] for name in names} for names in (MADE, REAL))
    write_whole(options.out / "made.png", sheet(made))
    write_whole(options.out / "real.png", sheet(real))
    print(table)
    moving = {name: found[name] for name in ("water", "flame")}
    print(write_video(options.out / "textures.gif", animation(moving), fps=20), "bytes of animation")


if __name__ == "__main__":
    main()
