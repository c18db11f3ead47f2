"""The operators of the degradation against closed forms and naive loops."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.degradation import blur, compression, noise, resize
from data.degradation.presets import REALBASICVSR, Sharpen, Walk
from tests.data.conftest import moving


def moments(kernel: torch.Tensor) -> np.ndarray:
    """Covariance (xx, yy, xy) of a kernel `[k, k]` taken as a distribution."""
    axis = np.arange(len(kernel)) - (len(kernel) - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    k = kernel.double().numpy()
    return np.array([(k * x * x).sum(), (k * y * y).sum(), (k * x * y).sum()])


@pytest.mark.parametrize("shape", [s for s in blur.SHAPES if s != "sinc"])
def test_kernels_sum_to_one_and_are_symmetric(shape):
    k = blur.gaussian_kernels(shape, 15, [0.2, 3.0], [1.0, 0.7], [0.4, -2.0], [0.6, 1.8])
    assert k.shape == (2, 15, 15)
    torch.testing.assert_close(k.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(k, k.flip(1, 2))
    assert (k >= 0).all()


def test_gaussian_kernels_have_the_covariance_they_name():
    iso = blur.gaussian_kernels("iso", 21, [1.7], [9.0], [1.0], [1.0])[0]
    np.testing.assert_allclose(moments(iso), [1.7**2, 1.7**2, 0], atol=1e-3)
    sx, sy, turn = 2.2, 0.9, 0.6
    aniso = blur.gaussian_kernels("aniso", 21, [sx], [sy], [turn], [1.0])[0]
    c, s = math.cos(turn), math.sin(turn)
    expected = [c * c * sx**2 + s * s * sy**2, s * s * sx**2 + c * c * sy**2, c * s * (sx**2 - sy**2)]
    np.testing.assert_allclose(moments(aniso), expected, atol=5e-3)


def test_generalised_and_plateau_kernels_follow_their_formulas():
    args = (9, [1.5], [1.5], [0.0])
    one = blur.gaussian_kernels("generalized_iso", *args, [1.0])
    torch.testing.assert_close(one, blur.gaussian_kernels("iso", *args, [1.0]))
    for shape, law in (("generalized_iso", lambda d: math.exp(-(d**2.5) / 2)), ("plateau_iso", None)):
        law = law or (lambda d: 1 / (1 + d**2.5))
        k = blur.gaussian_kernels(shape, *args, [2.5])[0]
        d = (1 + 4) / 1.5**2  # one right, two down of the centre
        torch.testing.assert_close(float(k[6, 5] / k[4, 4]), law(d), rtol=1e-5, atol=0)


def test_sinc_passes_below_its_cut_off_and_stops_above():
    k = blur.sinc_kernels(61, [math.pi / 2])[0]  # long, so that truncation matters little
    response = torch.fft.fft2(k, s=(256, 256)).abs()
    omega = 2 * math.pi * np.arange(129) / 256
    line = response[0, :129].numpy()
    assert abs(line[omega < 0.7 * math.pi / 2] - 1).max() < 0.1
    assert line[omega > 1.3 * math.pi / 2].max() < 0.1
    assert blur.sinc_kernels(7, [1.0, 3.0]).sum((1, 2)).sub(1).abs().max() < 1e-6


def test_blur_is_a_mirrored_convolution_with_each_frames_own_kernel():
    torch.manual_seed(0)
    for h, w in ((12, 15), (5, 6)):  # the second is smaller than the border
        x, k = torch.rand(2, 3, h, w), torch.rand(2, 15, 15)
        k /= k.sum((1, 2), keepdim=True)
        out = blur.apply(x, k)
        wide = np.pad(x.numpy(), ((0, 0), (0, 0), (7, 7), (7, 7)), mode="reflect")
        for f, c, i, j in ((0, 0, 0, 0), (1, 2, h - 1, 2), (1, 0, 3, w - 1)):
            expected = (wide[f, c, i : i + 15, j : j + 15] * k[f].numpy()).sum()
            assert abs(out[f, c, i, j].item() - expected) < 1e-5


def test_mirror_index_goes_to_and_fro():
    assert blur.mirror_index(4, 2, 7).tolist() == [2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert blur.mirror_index(1, 1, 2).tolist() == [0, 0, 0, 0]


def test_sharpen_steepens_edges_and_leaves_flat_parts():
    config = Sharpen(kernel=51, weight=0.5, threshold=10.0)
    flat = torch.full((1, 3, 64, 64), 0.4)
    torch.testing.assert_close(blur.sharpen(flat, config), flat)
    edge = flat.clone()
    edge[..., 32:] = 0.6
    taps = np.exp(-0.5 * (np.arange(-25, 26) / 8.0) ** 2)  # OpenCV's sigma for 51 taps

    def smooth(line):
        return np.convolve(np.pad(line, 25, mode="reflect"), taps / taps.sum(), mode="valid")

    line = np.repeat([0.4, 0.6], 32)
    detail = line - smooth(line)
    mask = smooth((np.abs(detail) > 10 / 255).astype(float))
    expected = mask * (line + 0.5 * detail) + (1 - mask) * line
    out = blur.sharpen(edge, config)[0, 1, 20]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
    assert out.max() > 0.62 and out.min() < 0.38


def test_area_resize_averages_exact_footprints():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 24, 36)
    torch.testing.assert_close(resize.apply(x, (8, 12), "area"), F.avg_pool2d(x, 3))
    # 24 -> 10 rows: blow up by 10, then average runs of 24
    fine = x.repeat_interleave(10, 2)
    expected = fine.reshape(2, 3, 10, 24, 36).mean(3)
    torch.testing.assert_close(resize.apply(x, (10, 36), "area"), expected)


@pytest.mark.parametrize("kind", ["bilinear", "area", "bicubic"])
def test_resize_keeps_a_ramp_in_place(kind):
    """Pixel centres must not shift: a linear ramp stays the same ramp."""
    ramp = ((torch.arange(40) + 0.5) / 40).expand(1, 1, 20, 40)
    for size in ((20, 26), (20, 52)):
        out = resize.apply(ramp, size, kind)[0, 0, 10]
        expected = (torch.arange(size[1]) + 0.5) / size[1]
        torch.testing.assert_close(out[4:-4], expected[4:-4], atol=5e-3, rtol=0)


def test_sizes_are_even_and_never_vanish():
    assert resize.even_size(135, 91, 0.5) == (66, 44)
    assert resize.even_size(32, 32, 0.15) == (8, 8)


def test_gaussian_noise_has_its_sigma():
    gen = torch.Generator().manual_seed(0)
    frame = torch.full((3, 256, 256), 0.5)
    out = noise.gaussian(frame, 12.0, False, gen)
    assert abs((out - frame).std().item() * 255 / 12 - 1) < 0.02
    gray = noise.gaussian(frame, 12.0, True, gen)
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    assert abs((gray - frame)[0].std().item() * 255 / 12 - 1) < 0.02


def test_poisson_noise_follows_the_unit_range_law():
    """Standard deviation scale * sqrt(value / 256) for a picture of 256 levels: 11.3 levels at mid-gray."""
    gen = torch.Generator().manual_seed(0)
    ramp = (torch.arange(256) / 255).expand(3, 4000, 256)
    for scale in (0.5, 1.0):
        error = (noise.poisson(ramp, scale, False, gen) - ramp)[:, :, 128].std().item()
        assert abs(error / (scale * math.sqrt(128 / 255 / 256)) - 1) < 0.02
    assert abs(math.sqrt(0.5 / 256) * 255 - 11.3) < 0.05
    flat = noise.poisson(torch.full((3, 64, 64), 0.5), 0.3, True, gen)
    assert torch.equal(flat[0], flat[1])


def test_jpeg_is_libjpegs_at_that_quality():
    frame = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    for quality in (30, 60, 95):
        data = compression.jpeg_bytes(frame, quality)
        factor = 5000 // quality if quality < 50 else 200 - 2 * quality
        table = Image.open(io.BytesIO(data)).quantization
        assert table[0][0] == (16 * factor + 50) // 100 and table[1][0] == (17 * factor + 50) // 100
    out = compression.jpeg(frame, 30)
    assert out.shape == frame.shape and not np.array_equal(out, frame)


def footage(frames, h, w):
    """A gray texture that moves by one pixel a frame: uint8 `H W 3` each."""
    picture = torch.from_numpy(np.random.default_rng(0).random((1, 1, h, w + frames))).float()
    smooth = blur.apply(picture, torch.ones(1, 5, 5) / 25)[0, 0].sub(0.5).mul(3).add(0.5).clamp(0, 1)
    levels = (smooth * 255).byte()[..., None].expand(-1, -1, 3).numpy()
    return [np.ascontiguousarray(levels[:, f : f + w]) for f in range(frames)]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_video_codec_damages_more_with_fewer_bits(codec):
    rng = np.random.default_rng(0)
    grain = [(f + rng.normal(0, 20, f.shape)).clip(0, 255).astype(np.uint8) for f in footage(16, 64, 96)]
    sizes, errors = [], []
    for bits in (2_000, 200_000):
        sizes.append(sum(p.size for p in compression.encode(grain, codec, bits, 4 * bits)) * 8 / 16)
        out = compression.video(grain, codec, bits, 4 * bits)
        assert len(out) == 16 and out[0].shape == (64, 96, 3)
        errors.append(np.abs(np.stack(out).astype(int) - np.stack(grain)).mean())
    # mpeg4's first frame is coarse at best; x264 comes close to what it is told
    assert sizes[0] < 20_000 < sizes[1]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_video_codec_takes_odd_sizes_one_frame_and_mixed_sizes(codec):
    odd = footage(3, 33, 47)
    out = compression.video(odd, codec, 200_000)
    assert np.abs(np.stack(out).astype(int) - np.stack(odd)).mean() < 5
    assert compression.video(odd[:1], codec, 50_000)[0].shape == (33, 47, 3)
    mixed = [f[: 30 - 2 * i] for i, f in enumerate(odd)]
    assert {f.shape for f in compression.video(mixed, codec, 50_000)} == {(30, 47, 3)}


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_codec_gives_the_same_bytes_every_time(codec):
    """Small pictures at low rates: x264's macroblock trees failed this in every third run."""
    frames = list(moving(1, 9, 42, 50))
    runs = {b"".join(bytes(p) for p in compression.encode(frames, codec, 6_000)) for _ in range(20)}
    assert len(runs) == 1


def test_codec_bits_scale_with_the_area():
    config = REALBASICVSR.first.codec
    small = compression.draw_codec(config, 256 * 256, np.random.default_rng(5))
    large = compression.draw_codec(config, 4 * 256 * 256, np.random.default_rng(5))
    assert 10_000 <= small["bits_per_frame"] <= 100_000
    assert large["codec"] == small["codec"] and large["tolerance"] == 4 * small["tolerance"] == 16_000_000
    assert large["bits_per_frame"] == 4 * small["bits_per_frame"]


def test_walks_stay_in_range_and_move_in_bounded_steps():
    walk = Walk(0.2, 1.0, 0.15)
    values = np.stack([walk.draw(200, np.random.default_rng(s)) for s in range(20)])
    assert values.min() >= 0.2 and values.max() <= 1.0
    steps = np.abs(np.diff(values))
    assert steps.max() <= 0.15 + 1e-12 and steps.max() > 0.14
    assert (values == 0.2).any() and (values == 1.0).any()
    assert walk.draw(3, np.random.default_rng(0), start=0.5)[0] == 0.5
