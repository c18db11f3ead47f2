"""Scene changes: found to the frame where clips were put together, and nowhere else."""

import numpy as np
import pytest

from data import synthetic
from data.scan import decode
from data.scenes import SIZE, CutDetector, ranges
from tests.data.footage import encode, scene, texture


def cuts(pictures: np.ndarray) -> list[int]:
    detector = CutDetector()
    for picture in pictures:
        detector.push(picture)
    return detector.cuts()


def small(seed: int, frames: int, speed: float = 0.7) -> np.ndarray:
    """Grey pictures of the detector's size, moving."""
    sheet = texture(seed, SIZE[0], SIZE[1] + 2 + round(speed * frames), 8).astype(np.uint8)
    return np.stack([sheet[:, round(speed * f) :][:, : SIZE[1]] for f in range(frames)])


def test_cuts_are_where_clips_were_put_together():
    rng = np.random.default_rng(0)
    for trial in range(40):
        lengths = rng.integers(9, 40, 5)
        clips = [small(10 * trial + i, int(n), float(rng.uniform(0, 0.5))) for i, n in enumerate(lengths)]
        assert cuts(np.concatenate(clips)) == np.cumsum(lengths)[:-1].tolist()


def test_cuts_of_an_encoded_video_are_exact(tmp_path):
    lengths = (17, 9, 30, 12)
    frames = np.concatenate([scene(i, n) for i, n in enumerate(lengths)])
    path = encode(tmp_path / "a.mp4", frames, options={"crf": "28", "bf": "3"})
    seen = decode(path, lambda: None)
    assert seen.frames == sum(lengths) and seen.detector.cuts() == [17, 26, 56]


def test_motion_flashes_and_fades_are_no_cuts():
    calm = small(3, 40)
    assert cuts(calm) == []
    assert cuts(small(4, 40, speed=6.0)) == []  # a fast pan: every frame differs much
    start = np.concatenate([np.repeat(calm[:1], 12, 0), small(3, 28, speed=5.0)])
    assert cuts(start) == []  # a camera that stands and then moves fast
    for length in (1, 2, 3):
        flash = calm.copy()
        flash[20 : 20 + length] = 255
        assert cuts(flash) == []
    threes = np.repeat(small(5, 12, speed=6.0), 3, 0)
    assert cuts(threes) == []  # animation drawn on threes
    fade = (calm * np.linspace(1, 0, len(calm))[:, None, None]).astype(np.uint8)
    assert cuts(fade) == []
    brighter = calm // 2
    brighter[20:] += 8  # a change of exposure
    assert cuts(brighter) == []
    black = calm.copy()
    black[20:24] = 0  # four black frames part two scenes
    assert cuts(black) == [20, 24]


def test_procedural_clips_have_no_cuts():
    from PIL import Image

    for number in range(2):
        pictures = [
            np.asarray(Image.fromarray(f).convert("L").resize(SIZE[::-1], Image.Resampling.BOX))
            for f in synthetic.clip(0, number)
        ]
        assert cuts(np.stack(pictures)) == []


def test_ranges():
    assert ranges(100, [], 1000, 5) == [(0, 100)]
    assert ranges(100, [40], 1000, 5) == [(0, 40), (40, 60)]
    assert ranges(100, [3, 40, 97], 1000, 5) == [(3, 37), (40, 57)]  # too short: left out
    assert ranges(100, [], 30, 5) == [(0, 25), (25, 25), (50, 25), (75, 25)]
    assert ranges(10, [], 4, 1) == [(0, 3), (3, 3), (6, 4)]
    assert ranges(100, [40], 1000, 5, edges=(0, 70)) == [(0, 40), (40, 30), (70, 30)]
    assert ranges(3, [], 10, 5) == []
    for total, most in ((997, 100), (1000, 100), (1001, 100)):
        clips = ranges(total, [123, 500], most, 1)
        assert [a + n for a, n in clips[:-1]] == [a for a, _ in clips[1:]] and clips[0][0] == 0
        assert sum(n for _, n in clips) == total and max(n for _, n in clips) <= most


def test_a_wrong_picture_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        CutDetector().push(np.zeros((64, 36), np.uint8))
