"""Scores against closed forms and other libraries' numbers."""

import functools
import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data import scores, synthetic
from flashvsr.base.draws import numpy_rng
from tests.data.footage import texture


def sheet(number: int, height: int = 256, width: int = 320) -> np.ndarray:
    return np.array(synthetic.SHEETS[number](numpy_rng("scores", number), height, width))


def test_sharpness_is_one_minus_the_blur_effect():
    measure = pytest.importorskip("skimage.measure")
    effect = functools.partial(measure.blur_effect, h_size=scores.REBLUR)
    for number in range(4):
        picture = scores.luma(sheet(number)).astype(np.float32)
        assert scores.sharpness([picture]) == pytest.approx(1 - effect(picture / 255), abs=2e-3)
    # several parts count by how much gradient they hold
    flat = np.full_like(picture, 100)
    assert scores.sharpness([picture, flat]) == pytest.approx(scores.sharpness([picture]), abs=1e-6)
    assert scores.sharpness([flat]) == 0


def test_sharpness_falls_with_blur_and_with_enlargement():
    for number in (0, 2, 4):
        picture = Image.fromarray(sheet(number))
        blurred = [picture.filter(ImageFilter.GaussianBlur(s)) for s in (0, 0.5, 1, 2, 4)]
        found = [scores.sharpness(scores.crops(scores.luma(np.array(p)))) for p in blurred]
        assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1]
        enlarged = picture.resize((80, 64), Image.Resampling.BICUBIC).resize(
            (320, 256), Image.Resampling.BICUBIC
        )
        assert scores.sharpness([scores.luma(np.array(enlarged)).astype(np.float32)]) < 0.5 * found[0]


def test_blockiness_of_a_grid_and_of_jpeg():
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 16, (32, 40)) * 16, np.ones((8, 8))).astype(np.float32)
    # neighbours of 16 levels are equal once in 16 times: there is no step
    assert scores.blockiness([blocks]) == pytest.approx(15 / 16, abs=0.02)
    for dy, dx in ((0, 3), (5, 0), (2, 6)):  # wherever the grid lies
        shifted = np.roll(blocks, (dy, dx), (0, 1))
        assert scores.blockiness([shifted]) == pytest.approx(15 / 16, abs=0.02)
    fives = np.kron(rng.integers(0, 16, (50, 64)) * 16, np.ones((5, 5))).astype(np.float32)
    assert scores.blockiness([fives]) < 0.05  # another grid
    assert scores.blockiness([rng.uniform(0, 255, (256, 320)).astype(np.float32)]) < 0.03
    assert scores.blockiness([np.zeros((64, 64), np.float32)]) == 0
    found = []
    for quality in (95, 40, 15, 5):
        buffer = io.BytesIO()
        Image.fromarray(sheet(3)).save(buffer, "jpeg", quality=quality)
        found.append(scores.blockiness(scores.crops(scores.luma(np.array(Image.open(buffer))))))
    assert found == sorted(found) and found[0] < 0.05 and found[-1] > 0.2


def test_noise_is_recovered():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:320]
    smooth = 128 + 60 * np.sin(x / 40) * np.cos(y / 50)
    for sigma in (2.0, 5.0, 12.0):
        noisy = (smooth + rng.normal(0, sigma, smooth.shape)).round().clip(0, 255).astype(np.float32)
        assert scores.noise([noisy]) == pytest.approx(sigma, rel=0.08)
        half = smooth + rng.normal(0, sigma, smooth.shape)
        half[:, :100] = texture(1, 256, 100) + rng.normal(0, sigma, (256, 100))  # detail is not noise
        assert scores.noise([half.astype(np.float32)]) == pytest.approx(sigma, rel=0.12)
        barred = noisy.copy()
        barred[:80] = 0  # a black border is not calm
        assert scores.noise([barred]) == pytest.approx(sigma, rel=0.08)
    assert scores.noise([smooth.astype(np.float32)]) < 0.1
    assert scores.noise([np.full((64, 64), 90, np.float32)]) == 0
    skimage = pytest.importorskip("skimage.restoration")
    assert scores.noise([noisy]) == pytest.approx(skimage.estimate_sigma(noisy), rel=0.1)


@pytest.mark.parametrize("shift", [(0, 0), (4, 0), (0, -7), (12, 9), (-20, 15)])
def test_motion_is_the_known_shift(shift):
    big = texture(3, 400, 700, 9).round().astype(np.uint8)
    one, other = (big[40 + dy : 328 + dy, 60 + dx : 572 + dx] for dy, dx in ((0, 0), shift))
    assert scores.motion(one, other) == pytest.approx(np.hypot(*shift), rel=0.03, abs=0.1)


def test_motion_of_parts_of_a_pixel_at_the_working_size():
    big = texture(4, 4 * 144, 4 * 300, 40)
    small = [
        np.asarray(Image.fromarray(big[:, dx : dx + 1024]).resize((256, 144), Image.Resampling.BOX))
        for dx in (0, 2, 3, 6)
    ]
    first = small[0].round().astype(np.uint8)
    for picture, expected in zip(small[1:], (0.5, 0.75, 1.5), strict=True):
        assert scores.motion(first, picture.round().astype(np.uint8)) == pytest.approx(expected, abs=0.12)


def test_motion_where_nothing_can_be_told():
    flat = np.full((144, 256), 90, np.uint8)
    assert scores.motion(flat, flat) is None
    unlike = [texture(seed, 144, 256, 2 + seed % 9).astype(np.uint8) for seed in range(12)]
    for one, other in zip(unlike, unlike[1:], strict=False):  # other pictures altogether
        assert scores.motion(one, other) is None


def test_bars_are_the_share_of_black_borders():
    frames = [np.full((100, 200), 80, np.uint8) for _ in range(3)]
    assert scores.bars(frames) == 0
    for frame in frames:
        frame[:12] = 16
        frame[-13:] = 16
    assert scores.bars(frames) == pytest.approx(0.25)
    for frame in frames:
        frame[:, :20] = 0
    assert scores.bars(frames) == pytest.approx(1 - 0.75 * 0.9)
    frames[0][:12] = 200  # black only for a while: no border
    assert scores.bars(frames) == pytest.approx(1 - 0.87 * 0.9, abs=0.11)
    assert scores.bars([np.zeros((50, 50), np.uint8)]) == 0


def test_change_between_sampled_frames():
    frames = [np.full((72, 128), level, np.uint8) for level in (50, 50, 53, 60)]
    assert scores.change(frames) == pytest.approx(7)
    assert scores.change(frames[:2]) == 0 and scores.change(frames[:1]) == 0


def test_phash_equals_imagehash():
    imagehash = pytest.importorskip("imagehash")
    for number in range(len(synthetic.SHEETS)):
        picture = sheet(number, 200 + 8 * number, 300)
        assert f"{scores.phash(picture):016x}" == str(imagehash.phash(Image.fromarray(picture)))


def test_phash_survives_size_and_compression_and_tells_pictures_apart():
    found = []
    for number in (0, 1, 2, 3, 5):
        picture = Image.fromarray(sheet(number))
        buffer = io.BytesIO()
        picture.resize((160, 128), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=40)
        a, b = scores.phash(np.array(picture)), scores.phash(np.array(Image.open(buffer)))
        assert (a ^ b).bit_count() <= 6
        found.append(a)
    assert min((a ^ b).bit_count() for i, a in enumerate(found) for b in found[:i]) > 12


def test_crops_keep_the_grid_and_the_frame_samples_are_uniform():
    picture = np.zeros((1080, 1920), np.uint8)
    picture[::8], picture[:, ::8] = 255, 255
    parts = scores.crops(picture)
    assert len(parts) == 5 and all(p.shape == (448, 448) and p[0].min() == 255 for p in parts)
    assert [p.shape for p in scores.crops(picture[:200])] == [(200, 1920)]
    assert scores.sampled(8, 4) == [1, 3, 5, 7] and scores.sampled(200, 4) == [25, 75, 125, 175]
    assert scores.sampled(1, 4) == [0] and scores.sampled(2, 4) == [0, 1]
