"""A small corpus with exactly known pixels: lossless clips of different sizes and lengths."""

import numpy as np
import pytest

from data.build import build
from flashvsr.base.video_io import VideoWriter


def moving(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """Smooth colours that drift, plus a frame number written as brightness: uint8 `F H W 3`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    out = np.empty((frames, height, width, 3), np.uint8)
    waves = rng.uniform(0.05, 0.4, (3, 3))
    for f in range(frames):
        for c in range(3):
            a, b, speed = waves[c]
            out[f, ..., c] = 127 + 90 * np.sin(a * x + b * y + speed * f) + 3 * f
    return out


def write_clip(path, frames: np.ndarray) -> None:
    with VideoWriter(path, 25, *frames.shape[1:3], lossless=True) as writer:
        writer.write(frames)


CLIPS = {"ash": (0, 24, 64, 96), "birch": (1, 13, 80, 64), "cedar": (2, 5, 64, 64), "fir": (3, 30, 96, 128)}


@pytest.fixture(scope="session")
def footage(tmp_path_factory):
    """A folder of four clips: ash 24 frames 96x64, birch 13 64x80, cedar 5 64x64, fir 30 128x96."""
    folder = tmp_path_factory.mktemp("footage")
    for name, shape in CLIPS.items():
        write_clip(folder / f"{name}.mkv", moving(*shape))
    return folder


@pytest.fixture(scope="session")
def shards(footage, tmp_path_factory):
    """The four clips as shards, one held out."""
    out = tmp_path_factory.mktemp("shards") / "data"
    build([footage], out, quiet=True)
    return out


@pytest.fixture
def quick(monkeypatch):
    """Degrades in no time: every fourth pixel, plus a number drawn from the sample's generator."""

    def degrade(hr, scale, name, rng):
        return hr[:, ::scale, ::scale] ^ np.uint8(rng.integers(256)), {}

    monkeypatch.setattr("data.clips.degrade", degrade)
