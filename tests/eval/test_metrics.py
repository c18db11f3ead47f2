"""Metrics against independent implementations: torchmetrics, scikit-image and the package lpips."""

import math

import numpy as np
import pytest
import torch

from eval.metrics import Lpips, psnr, psnr_per_frame, ssim, ssim_per_frame
from eval.metrics.lpips import import_lpips
from flashvsr.base.cli import UserError

import_lpips()  # torchmetrics imports torchvision, which may need the declared operators


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 clips, 3 x 40 x 52, whose difference grows from frame to frame."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:52]
    smooth = 127 + 100 * np.sin(rows / 5)[..., None] * np.cos(columns / 7)[..., None] * [1, 0.7, -0.8]
    a = np.stack([np.roll(smooth, 3 * i, axis=1) for i in range(3)])
    b = a + rng.normal(size=a.shape) * np.array([2, 8, 30])[:, None, None, None]
    return a.round().clip(0, 255).astype(np.uint8), b.round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def random_lpips() -> Lpips:
    return Lpips("alex", "random", seed=3)


def signed(clip: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_psnr_equals_torchmetrics_and_scikit_image(clips):
    from skimage.metrics import peak_signal_noise_ratio
    from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

    a, b = clips
    per_frame = psnr_per_frame(a, b)
    for value, x, y in zip(per_frame, a, b, strict=True):
        assert value.item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-5)
        other = torchmetrics_psnr(torch.tensor(x).double(), torch.tensor(y).double(), data_range=255.0)
        assert value.item() == pytest.approx(other.item(), abs=1e-5)
    assert psnr(a, b) == pytest.approx(per_frame.mean().item())
    assert per_frame[0] > per_frame[1] > per_frame[2]


def test_ssim_equals_torchmetrics_and_scikit_image(clips):
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = clips
    per_frame = ssim_per_frame(a, b)
    for value, x, y in zip(per_frame, a, b, strict=True):
        window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        expected = structural_similarity(x, y, channel_axis=-1, data_range=255, **window)
        assert value.item() == pytest.approx(expected, abs=2e-6)
    x, y = ((signed(c).double() + 1) / 2 for c in clips)
    _, full = structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = full[..., 5:-5, 5:-5].mean(
        dim=(1, 2, 3)
    )  # torchmetrics also counts a mirrored border; we do not
    torch.testing.assert_close(per_frame, expected, atol=2e-6, rtol=0)
    assert ssim(a, b) == pytest.approx(expected.mean().item(), abs=2e-6)


def test_numpy_torch_uint8_and_float_clips_give_the_same_number(clips):
    a, b = clips
    floats = [torch.from_numpy(c).double() / 255 for c in clips]
    assert psnr(*floats) == pytest.approx(psnr(a, b), abs=1e-4)
    assert ssim(*floats) == pytest.approx(ssim(a, b), abs=1e-6)
    assert psnr(torch.from_numpy(a), b) == psnr(a, b)


def test_equal_clips_are_perfect(clips, random_lpips):
    a = clips[0]
    assert math.isinf(psnr(a, a))
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert random_lpips.clip(a, a) == 0


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clips_that_do_not_fit_are_refused(metric, clips):
    a, b = clips
    with pytest.raises(ValueError, match="shapes"):
        metric(a, b[:2])
    with pytest.raises(ValueError, match="F H W 3"):
        metric(a[..., :1], b[..., :1])
    with pytest.raises(ValueError, match="int32"):
        metric(a.astype(np.int32), b.astype(np.int32))
    with pytest.raises(ValueError, match="11x11"):
        ssim(a[:, :8], b[:, :8])


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_equals_the_package_with_the_same_weights(net, clips):
    ours = Lpips(net, "random", seed=1)
    lpips = import_lpips()
    with torch.random.fork_rng(devices=[]):
        package = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # its own heads, another random trunk
    package.net.load_state_dict(ours.model.net.state_dict())
    x, y = (torch.nn.functional.interpolate(signed(c), size=(72, 80)) for c in clips)
    with torch.no_grad():
        expected = package(x, y).flatten()
    torch.testing.assert_close(ours(x, y), expected, rtol=2e-5, atol=1e-7)
    assert expected.min() > 1e-4


def test_random_trunk_depends_on_the_seed_alone_and_leaves_the_global_generator(clips, random_lpips):
    state = torch.get_rng_state()
    again, other = Lpips("alex", "random", seed=3), Lpips("alex", "random", seed=4)
    assert torch.equal(state, torch.get_rng_state())
    a, b = clips
    assert again.clip(a, b) == random_lpips.clip(a, b) != other.clip(a, b)


def test_lpips_is_a_frozen_loss_with_finite_gradients_also_under_autocast(clips, random_lpips):
    x, y = signed(clips[0]), signed(clips[1])
    assert not any(p.requires_grad for p in random_lpips.parameters())

    gradients = []
    for enabled in (False, True):
        x.requires_grad_().grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = random_lpips(x, y)
        assert loss.shape == (3,) and loss.dtype == torch.float32
        loss.sum().backward()
        gradients.append(x.grad.clone())
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.97

    step = 1e-2 * gradients[0] / gradients[0].abs().max()
    with torch.no_grad():
        change = (random_lpips(x + step, y) - random_lpips(x - step, y)).sum().item() / 2
    assert change == pytest.approx((gradients[0] * step).sum().item(), rel=0.05)


def test_gradient_is_finite_where_all_channels_are_dead(random_lpips):
    # Zero after the input scaling: with zero biases no channel answers, and the package itself gives NaN.
    shift = random_lpips.model.scaling_layer.shift
    x = shift.expand(1, 3, 64, 64).clone().requires_grad_()
    random_lpips(x, torch.zeros_like(x)).sum().backward()
    assert x.grad.isfinite().all()


def test_real_backbone_weights_are_found_in_the_hub_cache_and_named(
    tmp_path, monkeypatch, clips, random_lpips
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert Lpips().name == "lpips-random" and "seed 0" in Lpips().description
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "alexnet-owt-0123abcd.pth"
    stored = random_lpips.model.net.state_dict().items()
    torch.save({f"features.{name.split('.', 1)[1]}": value for name, value in stored}, file)

    for found in (Lpips(), Lpips(weights=file)):
        assert found.name == "lpips" and file.name in found.description
        assert found.clip(*clips) == random_lpips.clip(*clips)
    with pytest.raises(UserError, match="alexnet-owt-0123abcd"):
        Lpips("vgg", weights=file)
    file.write_bytes(b"cut short")
    with pytest.raises(UserError, match="not a torchvision checkpoint"):
        Lpips()


def test_wrong_arguments_are_one_sentence():
    with pytest.raises(UserError, match="alex, vgg, squeeze"):
        Lpips("resnet")
    with pytest.raises(UserError, match="nowhere.pth"):
        Lpips(weights="nowhere.pth")
