"""Metrics of change in time where the answer is known, and where there is none."""

import math

import numpy as np
import pytest
import torch

from eval.metrics import metrics_for
from eval.metrics.flow import Flow
from flashvsr.base.cli import UserError


def grey(levels, size=(24, 32)) -> np.ndarray:
    """A clip whose frame t is one grey level."""
    levels = np.asarray(levels, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (len(levels), *size, 3)).copy()


def values(names, sr, hr=None, **more):
    scoring = metrics_for(names, **more).start()
    scoring.push(sr, hr)
    return scoring.finish()


def test_temporal_differences_of_known_steps():
    hr, sr = grey([10, 12, 14, 16]), grey([50, 53, 56, 58])
    found = values(["tdiff", "tdiff_ratio"], sr, hr)
    assert found["tdiff"].per_frame.tolist() == pytest.approx([1, 1, 0], abs=1e-4)
    assert found["tdiff"].clip == pytest.approx(2 / 3, abs=1e-5)
    assert found["tdiff_ratio"].clip == pytest.approx(8 / 6) and found["tdiff_ratio"].first == 1


def test_the_chunk_edge_score_sees_steps_between_frames_4_and_5_and_12_and_13_only():
    step = np.array([1] * 4 + [5] + [1] * 7 + [3] + [1] * 3)
    sr, hr = grey(np.concatenate([[0], np.cumsum(step)])), grey(np.arange(17) * 2)
    found = values(["chunk_edge", "chunk_edge_ratio"], sr, hr)
    assert found["chunk_edge"].clip == pytest.approx(4) == found["chunk_edge_ratio"].clip
    assert found["chunk_edge"].per_frame.tolist() == pytest.approx(list(step))
    shifted = grey(np.concatenate([[0], np.cumsum(np.roll(step, 1))]))
    assert values(["chunk_edge"], shifted)["chunk_edge"].clip < 1


@pytest.mark.parametrize(
    "names, frames, words",
    [
        (["tdiff", "tdiff_ratio", "ewarp", "ewarp_delta", "tlpips"], 1, "one frame"),
        (["chunk_edge", "chunk_edge_ratio"], 5, "5 frames has no chunk edge"),
    ],
)
def test_a_clip_too_short_has_no_value_and_says_why(names, frames, words):
    clip = np.random.default_rng(0).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    for value in values(names, clip, clip).values():
        assert value.clip is None and words in value.reason


def test_a_ratio_to_a_still_clip_is_not_defined():
    moving, still = grey(np.arange(8)), grey([7] * 8)
    found = values(["tdiff_ratio", "chunk_edge_ratio"], moving, still)
    assert found["tdiff_ratio"].clip is None and "HR frames do not change" in found["tdiff_ratio"].reason
    assert found["chunk_edge_ratio"].clip is None and "HR" in found["chunk_edge_ratio"].reason
    assert values(["chunk_edge"], still)["chunk_edge"].clip is None
    # one still step among moving ones has no ratio of its own, the clip has
    part = values(["tdiff_ratio"], moving, grey([0, 1, 1, 2, 3, 4, 5, 6]))["tdiff_ratio"]
    assert math.isnan(part.per_frame[1]) and part.clip == pytest.approx(7 / 6)


def known(shift) -> Flow:
    """Every pixel moves by `shift`, (x, y); the field back is told apart by the frames' order."""

    def between(first, second):
        sign = 1.0 if first.mean() < second.mean() else -1.0
        field = torch.tensor(shift, dtype=torch.float32)[:, None, None] * sign
        return field.expand(len(first), 2, *first.shape[2:])

    return Flow("known", "a known shift", between)


def test_warping_follows_motion_leaves_out_what_moves_out_and_sees_flicker():
    rng = np.random.default_rng(0)
    wide = rng.integers(60, 120, (48, 80, 3))
    hr = np.stack([wide[:, 3 * t : 3 * t + 64] + t for t in range(4)]).astype(np.uint8)
    flicker = hr + np.array([0, 40, 0, 40], np.uint8)[:, None, None, None]
    flow = known((-3.0, 0.0))
    still = values(["ewarp", "ewarp_delta"], hr, hr, flow=flow)
    assert still["ewarp-known"].clip == pytest.approx(1000 / 255**2, rel=1e-3)  # the frames brighten by one
    assert still["ewarp_delta-known"].clip == 0
    loud = values(["ewarp", "ewarp_delta"], flicker, hr, flow=flow)
    expected = [1000 * (step / 255) ** 2 for step in (41, 39, 41)]
    assert loud["ewarp-known"].per_frame.tolist() == pytest.approx(expected, rel=1e-3)
    assert loud["ewarp_delta-known"].clip == pytest.approx(np.mean(expected) - 1000 / 255**2, rel=1e-3)
    gone = values(["ewarp"], hr, hr, flow=known((-70.0, 0.0)))["ewarp-known"]
    assert gone.clip is None and "not defined" in gone.reason


def test_without_gt_motion_comes_from_lq():
    rng = np.random.default_rng(1)
    wide = np.kron(rng.integers(0, 255, (24, 40, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    sr = np.stack([wide[:, 4 * t : 4 * t + 128] for t in range(3)])
    lq = sr[:, ::4, ::4]
    scoring = metrics_for(["ewarp"]).start()
    scoring.push(sr, lq=lq)
    moved = scoring.finish()["ewarp-lk"].clip
    assert moved < 0.2 * 1000 * np.mean((np.diff(sr.astype(float) / 255, axis=0)) ** 2)
    with pytest.raises(UserError, match="from the LQ frames"):
        metrics_for(["ewarp"]).start().push(sr)
    with pytest.raises(UserError, match="every push"):
        scoring.push(sr)


def test_a_better_value_ranks_first():
    suite = metrics_for(["psnr", "tdiff", "tdiff_ratio", "ewarp_delta"])
    pairs = {"psnr": (31, 30), "tdiff": (1, 2), "tdiff_ratio": (0.9, 1.2), "ewarp_delta-lk": (-0.1, 0.2)}
    for metric in suite.metrics:
        better, worse = pairs[metric.key]
        assert metric.rank(better) < metric.rank(worse)
