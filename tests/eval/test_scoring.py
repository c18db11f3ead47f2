"""Scoring clips as they come: splits, crops, bad input, bounded memory."""

import gc
import sys

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


FOR_ALL = ["psnr", "psnr_y", "ssim", "ssim_y", "lpips", "tdiff", "tdiff_ratio", "chunk_edge"]
FOR_ALL += ["chunk_edge_ratio", "tlpips", "ewarp", "ewarp_delta"]


def test_any_split_of_a_clip_gives_the_same_numbers(clips, lpips):
    suite = metrics_for(FOR_ALL, lpips=lpips)
    whole, split = scored(suite, *clips), scored(suite, *clips, splits=(1, 7, 0, 2, 8))
    for key, value in whole.items():
        assert value.clip == split[key].clip and torch.equal(value.per_frame, split[key].per_frame), key


def test_frames_handled_together_as_on_a_gpu_give_the_numbers_of_one_by_one(clips, lpips, monkeypatch):
    suite = metrics_for(FOR_ALL, lpips=lpips)
    single = scored(suite, *clips)
    monkeypatch.setattr("eval.metrics.scoring._together", lambda device, area: 4)
    for key, value in scored(suite, *clips, splits=(3, 6, 9)).items():
        torch.testing.assert_close(value.per_frame, single[key].per_frame, rtol=1e-4, atol=1e-6, msg=key)
        assert value.first == single[key].first


def test_niqe_of_frames_together_is_that_of_each(monkeypatch):
    from skimage.data import coffee

    frames = np.stack([coffee()[:200, :300], coffee()[100:300, 200:500]])
    suite = metrics_for(["niqe"])
    single = scored(suite, frames, splits=(2,))["niqe"].per_frame
    monkeypatch.setattr("eval.metrics.scoring._together", lambda device, area: 2)
    torch.testing.assert_close(scored(suite, frames, splits=(2,))["niqe"].per_frame, single)


def test_the_callers_autocast_and_tf32_do_not_reach_a_metric(clips, lpips):
    suite = metrics_for(FOR_ALL, lpips=lpips)
    plain = scored(suite, *clips, splits=(3,))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with torch.autocast("cpu", torch.bfloat16):
        low = scored(suite, *clips, splits=(3,))
    assert [v.clip for v in low.values()] == [v.clip for v in plain.values()]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_ssim_in_strips_is_ssim(clips, monkeypatch):
    suite = metrics_for(["ssim", "ssim_y"])
    whole = scored(suite, *clips)
    monkeypatch.setattr(
        sys.modules["eval.metrics.ssim"], "_STRIP", {False: 1}
    )  # strips as narrow as they get
    for key, value in scored(suite, *clips).items():
        torch.testing.assert_close(value.per_frame, whole[key].per_frame, rtol=1e-12, atol=0)


def test_frames_too_small_or_too_flat_for_niqe():
    suite = metrics_for(["niqe"])
    for height, width in ((95, 300), (190, 190)):
        noise = np.random.default_rng(1).integers(0, 255, (2, height, width, 3), dtype=np.uint8)
        small = scored(suite, noise, splits=(2,))["niqe"]
        assert small.clip is None and "two blocks of 96x96" in small.reason
    texture = np.random.default_rng(0).integers(0, 255, (3, 96, 192, 3), dtype=np.uint8)
    texture[1] = 0
    value = scored(suite, texture, splits=(3,))["niqe"]
    assert value.clip == pytest.approx(value.per_frame[[0, 2]].mean().item()) and "1 of 3" in value.reason
    black = scored(suite, texture[1:2], splits=(1,))["niqe"]
    assert black.clip is None and "texture" in black.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu(clips, lpips):
    on_cpu = scored(metrics_for(FOR_ALL, lpips=lpips), *clips)
    on_gpu = scored(metrics_for(FOR_ALL, lpips=lpips, device="cuda"), *clips)
    lpips.to("cpu")
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[key].per_frame, value.per_frame, rtol=1e-3, atol=1e-5, msg=key)
