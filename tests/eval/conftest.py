"""A small test set: two clips of moving texture and their reduced partners, written as PNG frames."""

import numpy as np
import pytest
import torch

from eval.prepare import write_frames
from flashvsr.base.resize import bicubic_8bit

SCALE, HEIGHT, WIDTH = 4, 96, 128


def moving_texture(seed: int, frames: int) -> np.ndarray:
    """uint8 `F 96 128 3`, smooth blobs and fine grain shifting by two pixels a frame."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.uniform(0, 255, (12, 16, 3)), np.ones((8, 8, 1)))
    picture = (0.8 * coarse + rng.uniform(0, 50, (HEIGHT, WIDTH, 3))).astype(np.uint8)
    return np.stack([np.roll(picture, 2 * i, axis=1) for i in range(frames)])


def reduced(frames: np.ndarray) -> np.ndarray:
    """`frames` at a quarter of the size by bicubic."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    small = bicubic_8bit(x, (x.shape[2] // SCALE, x.shape[3] // SCALE))
    return small.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="session")
def hr_clips() -> dict[str, np.ndarray]:
    return {"alpha": moving_texture(1, 5), "beta": moving_texture(2, 11)}


@pytest.fixture(scope="session")
def test_folder(tmp_path_factory, hr_clips):
    folder = tmp_path_factory.mktemp("set")
    for name, frames in hr_clips.items():
        write_frames(folder / "GT" / name, frames)
        write_frames(folder / "LQ" / name, reduced(frames))
    return folder
