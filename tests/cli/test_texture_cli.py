import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bmojo.realize.clips import wave
from bmojo.realize.texture import DynamicTexture
from bmojo.realize.video import read_video, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "wave.mp4"
    write_video(path, wave(60, 32), fps=20)
    return path


@pytest.fixture(scope="module")
def model(clip):
    path = clip.with_name("wave.texture")
    video = read_video(clip)
    DynamicTexture.fit(video.frames, 6, video.fps).save(path)
    return path


def test_fit_says_what_it_did(bmojo, clip, tmp_path):
    out = tmp_path / "wave.texture"
    code, said, err = bmojo("texture", "fit", clip, "--states", 6, "-o", out)
    assert (code, err) == (0, "")
    texture = DynamicTexture.load(out)
    assert f"{clip}: 60 frames, 32 x 32 gray, 20 a second\n6 states leave 0.0" in said
    assert f"a noise floor of {texture.noise_floor:.4f}" in said
    assert f"spectral radius {texture.radius:.5f}" in said
    assert f"{out}: {out.stat().st_size / 1024:.1f} KiB" in said
    assert f"bmojo texture synthesize {out}" in said


def test_fit_names_its_file_itself(bmojo, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = bmojo("texture", "fit", clip, "--states", 6)
    assert (code, [path.name for path in tmp_path.iterdir()]) == (0, ["wave.texture"])
    assert "\nwave.texture: " in said


def test_fit_reads_less_of_it_smaller(bmojo, clip, tmp_path):
    out = tmp_path / "wave.texture"
    assert bmojo("texture", "fit", clip, "--states", 4, "--size", 16, "--max-frames", 20, "--fps", 5, "-o", out)[0] == 0
    texture = DynamicTexture.load(out)
    assert (texture.mean.shape, texture.clip_frames, texture.fps, texture.states) == ((16, 16, 1), 20, 5, 4)


@pytest.mark.parametrize("name", ["new.mp4", "new.gif", "new"])
@pytest.mark.parametrize("speed", [0.5, -1])
def test_synthesize(bmojo, model, tmp_path, name, speed):
    out = tmp_path / name
    code, said, err = bmojo("texture", "synthesize", model, "--frames", 12, "--speed", speed, "--seed", 1, "-o", out)
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: 12 frames, 32 x 32 gray, at speed {speed:g}, seed 1; ")
    frames = read_video(out).frames
    expected = DynamicTexture.load(model).synthesize(12, speed, seed=1)
    assert np.sqrt(np.square(frames - expected).mean()) < (0.02 if name == "new.mp4" else 0.003)


def test_wrong_input_is_one_line(refused, model, clip, tmp_path):
    out = tmp_path / "x.mp4"
    assert "no such file" in refused("texture", "fit", tmp_path / "none.mp4")
    assert "need at least 62 frames, got 60" in refused("texture", "fit", clip, "--states", 60)
    assert "--states" in refused("texture", "fit", clip, "--states", 0)
    assert "got the name of a video" in refused("texture", "fit", clip, "-o", clip)
    assert "is no texture" in refused("texture", "synthesize", clip, "-o", out)
    assert "no file" in refused("texture", "synthesize", tmp_path / "none", "-o", out)
    assert "speed must be a finite number" in refused("texture", "synthesize", model, "--speed", 0, "-o", out)
    assert "frames must be from 1" in refused("texture", "synthesize", model, "--frames", 10**9, "-o", out)
    assert "expected a name in .mp4" in refused("texture", "synthesize", model, "-o", tmp_path / "x.webm")
    assert "fps" in refused("texture", "synthesize", model, "--fps", -1, "-o", out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["new.mp4", "new"])
def test_ctrl_c_leaves_nothing_half_written(model, tmp_path, name):
    """And what was there stays; in a process of its own, with the signal that a terminal sends."""
    out, work = tmp_path / "out", tmp_path / "tmp"
    out.mkdir()
    work.mkdir()
    if name == "new.mp4":
        (out / name).write_bytes(b"what was there")
    command = [sys.executable, "-m", "bmojo", "texture", "synthesize", model, "--frames", "100000", "-o", out / name]
    environment = os.environ | {"TMPDIR": os.fspath(work)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not any(work.glob("*/*.mp4")) and not any(out.glob(".*/*.png")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert (process.returncode, said, err) == (130, "", "bmojo: stopped\n")
    assert list(work.iterdir()) == []
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == (
        [(name, b"what was there")] if name == "new.mp4" else []
    )
