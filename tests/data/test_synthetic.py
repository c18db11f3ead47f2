"""Procedural clips: deterministic, of the promised sizes, moving, and with detail that shrinking destroys."""

import numpy as np
import pytest
import torch

from data import synthetic
from data.build import build
from flashvsr.base.draws import numpy_rng
from flashvsr.base.resize import bicubic_8bit


def loss_by_shrinking(picture: np.ndarray) -> float:
    """PSNR in dB after bicubic x1/4 and back."""
    x = torch.from_numpy(picture).permute(2, 0, 1)
    h, w = x.shape[1:]
    back = bicubic_8bit(bicubic_8bit(x, (h // 4, w // 4)), (h, w))
    return float(10 * torch.log10(255**2 / (back.float() - x.float()).pow(2).mean()))


@pytest.mark.parametrize("sheet", synthetic.SHEETS)
def test_sheets_hold_detail_that_super_resolution_must_restore(sheet):
    picture = np.array(sheet(numpy_rng("sheet", 0), 240, 320))
    assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8
    assert 12 < loss_by_shrinking(picture) < 30


def test_a_clip_follows_from_its_seed_and_moves_in_small_steps():
    frames = synthetic.clip(0, 1)
    f, h, w, c = frames.shape
    assert (h, w) in synthetic.SIZES and synthetic.FRAMES[0] <= f <= synthetic.FRAMES[1] and c == 3
    assert np.array_equal(frames, synthetic.clip(0, 1))
    other = synthetic.clip(1, 1)
    assert other.shape != frames.shape or not np.array_equal(other, frames)
    steps = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    apart = np.abs(frames[0].astype(int) - frames[-1]).mean()
    assert steps.min() > 0.3 and steps.max() < apart  # no frame stands still, none is a cut


def test_build_without_sources_makes_both_splits_and_is_repeatable(tmp_path):
    index = build([], tmp_path / "a", synthetic_clips=1, seed=7, quiet=True)
    assert [len(index.splits[s]) for s in ("train", "val")] == [1, 1]
    assert all(s.frames >= 49 for rows in index.splits.values() for s in rows)
    assert index.splits["train"][0].sha256 != index.splits["val"][0].sha256
    stamp = (tmp_path / "a" / "index.json").stat().st_mtime_ns
    build([], tmp_path / "a", synthetic_clips=1, seed=7, quiet=True)
    assert (tmp_path / "a" / "index.json").stat().st_mtime_ns == stamp
