"""Scoring clips as they come: splits, crops, bad input, bounded memory."""

import gc

import numpy as np
import pytest
import torch

from eval.metrics import Lpips, metrics_for, psnr, ssim
from eval.metrics.frames import Stack
from flashvsr.base.cli import UserError

SIZE = (100, 112)


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray]:
    """SR and HR, uint8 18 x 100 x 112: moving texture and a noisy copy of it."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.uniform(0, 200, (13, 14, 3)), np.ones((8, 8, 1)))[: SIZE[0]]
    picture = coarse + rng.uniform(0, 55, (*SIZE, 3))
    hr = np.stack([np.roll(picture, i, axis=1) for i in range(18)])
    sr = hr + rng.normal(size=hr.shape) * 9
    return sr.round().clip(0, 255).astype(np.uint8), hr.round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    return Lpips("squeeze", "random")


def scored(suite, sr, hr=None, splits=(18,), **more):
    scoring, at = suite.start(), 0
    for n in splits:
        scoring.push(sr[at : at + n], None if hr is None else hr[at : at + n], **more)
        at += n
    return scoring.finish()


def test_scoring_gives_the_numbers_of_the_whole_clip_functions(clips, lpips):
    values = scored(metrics_for(["psnr", "ssim", "lpips"], lpips=lpips), *clips, splits=(5, 13))
    assert values["psnr"].clip == psnr(*clips) and values["ssim"].clip == ssim(*clips)
    assert values["lpips-random"].clip == lpips.clip(*clips)
    assert values["psnr"].per_frame.shape == (18,) and values["psnr"].per_frame.dtype == torch.float64


def test_a_crop_is_the_same_as_cropped_frames(clips, lpips):
    names = ["psnr", "ssim_y", "lpips"]
    inner = [c[:, 4:-4, 4:-4] for c in clips]
    cropped, plain = metrics_for(names, crop=4, lpips=lpips), metrics_for(names, lpips=lpips)
    got, expected = scored(cropped, *clips), scored(plain, *inner)
    assert {k: v.clip for k, v in got.items()} == {k: v.clip for k, v in expected.items()}


def test_memory_does_not_grow_with_the_clip(clips, lpips):
    scoring = metrics_for(["psnr", "psnr_y", "ssim", "lpips"], lpips=lpips).start()
    for _ in range(3):
        scoring.push(*clips)
    gc.collect()
    assert sum(type(o) is Stack for o in gc.get_objects()) <= 4  # this and the one before, SR and HR


def test_mistakes_are_one_sentence(clips):
    sr, hr = clips
    suite = metrics_for(["psnr", "ssim"])
    for arguments, words in (
        ((sr, hr[:, :96]), "output is 112x100, its GT is 112x96"),
        ((sr, hr[:5]), "18 frames of sr and 5 of hr"),
        ((sr.astype(np.float32), hr), "uint8"),
        ((sr[..., 0], hr), "n H W 3"),
        ((sr,), "psnr compares with GT"),
        ((sr[:, :8], hr[:, :8]), "ssim needs frames of at least 11x11"),
    ):
        with pytest.raises(UserError, match=words):
            suite.start().push(*arguments)
    with pytest.raises(UserError, match="without a border of 46"):
        metrics_for(["ssim"], crop=46).start().push(sr, hr)
    with pytest.raises(UserError, match="no frames"):
        suite.start().finish()
    with pytest.raises(UserError, match="unknown metric 'psnry'"):
        metrics_for(["psnry"])
    with pytest.raises(UserError, match="twice"):
        metrics_for(["psnr", "psnr"])
