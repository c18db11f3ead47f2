"""`y, memory = f(x, memory)`: any split of a clip gives the whole clip's result, and time reaches as far as
the design says."""

import pytest
import torch

from flashvsr.base.cli import UserError
from flashvsr.config import ProjectorConfig
from flashvsr.models.lr_projector import LRProjector


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def double(micro_model):
    """The micro model's modules in float64, and back again."""
    model = micro_model()
    modules = (model.tc_decoder, model.vae, model.lr_projector)
    for module in modules:
        module.double()
    yield model
    for module in modules:
        module.float()


@pytest.mark.parametrize("split", [[1] * 7, [2, 2, 3], [6, 1]])
def test_tc_decoder_in_parallel_equals_any_split(double, split):
    latent, lr = torch.randn(2, 16, 7, 2, 3).double(), torch.randn(2, 3, 25, 16, 24).double()
    whole, _ = double.tc_decoder(latent, lr)
    memory, parts, at, frame = None, [], 0, 0
    for n in split:
        frames = 4 * n - 3 * (at == 0)
        y, memory = double.tc_decoder(latent[:, :, at : at + n], lr[:, :, frame : frame + frames], memory)
        parts.append(y)
        at, frame = at + n, frame + frames
    assert whole.shape == (2, 3, 25, 16, 24)
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-13


def test_tc_decoder_says_what_does_not_fit(double):
    with pytest.raises(
        UserError, match=r"\(5, 16, 24\) beside latents of size \(2, 2, 3\), got \(8, 16, 24\)"
    ):
        double.tc_decoder(torch.randn(1, 16, 2, 2, 3).double(), torch.randn(1, 3, 8, 16, 24).double())


@pytest.mark.parametrize("split", [[1] * 5, [2, 3], [1, 4]])
def test_vae_in_one_call_equals_any_split(double, split):
    video = torch.randn(1, 3, 17, 16, 24).double()
    whole, _ = double.vae.encode(video)
    frames, _ = double.vae.decode(whole)
    memory, back, latents, decoded, at = None, None, [], [], 0
    for n in split:
        count = 4 * n - 3 * (at == 0)
        z, memory = double.vae.encode(video[:, :, at : at + count], memory)
        y, back = double.vae.decode(z, back)
        latents.append(z)
        decoded.append(y)
        at += count
    assert whole.shape == (1, 16, 5, 2, 3) and frames.shape == video.shape
    assert (torch.cat(latents, 2) - whole).abs().max() < 1e-13
    assert (torch.cat(decoded, 2) - frames).abs().max() < 1e-13


def test_vae_checkpointing_gives_the_same_gradient(micro_model):
    vae = micro_model().vae
    video = torch.rand(1, 3, 9, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        vae.checkpointing = checkpointing
        x = video.clone().requires_grad_()
        first, memory = vae.encode(x[:, :, :5])
        second, _ = vae.encode(x[:, :, 5:], memory)
        (first.square().sum() + second.square().sum()).backward()
        gradients.append(x.grad)
    vae.checkpointing = False
    assert torch.allclose(*gradients, rtol=0, atol=1e-6) and gradients[0].abs().max() > 0


def test_projector_streams_in_causal_and_buffer_mode(double):
    video = torch.randn(1, 3, 21, 32, 16).double()
    for mode in ("causal", "buffer"):
        (whole,), _ = double.lr_projector(video, mode=mode)
        memory, parts, at = None, [], 0
        for count in (9, 4, 8):
            (y,), memory = double.lr_projector(video[:, :, at : at + count], memory, mode=mode)
            parts.append(y)
            at += count
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-13
    with pytest.raises(UserError, match="looks ahead and cannot stream"):
        double.lr_projector(video[:, :, :4], memory, mode="clip")


@pytest.mark.parametrize("mode,first,last", [("causal", -5, 4), ("clip", -2, 7), ("buffer", 1, 4)])
def test_projector_feature_i_sees_frames_4i_plus(mode, first, last):
    """Which features change when one frame changes; frame 0 stands four times."""
    projector = LRProjector(ProjectorConfig(4, 4, 4, mode=mode)).double().requires_grad_(False)
    video = torch.randn(1, 3, 29, 16, 16).double()
    (base,), _ = projector(video)
    for f in range(29):
        other = video.clone()
        other[:, :, f] += 1
        changed = (projector(other)[0][0] - base).abs().amax((0, 2, 3, 4)) > 0
        # the repeats of frame 0 are frames -3 ... 0
        expected = [
            any(4 * i + first <= g <= 4 * i + last for g in (range(-3, 1) if f == 0 else [f]))
            for i in range(7)
        ]
        assert changed.tolist() == expected, (f, mode)


def test_projector_refuses_wrong_sizes(double):
    with pytest.raises(UserError, match="4n\\+1 frames"):
        double.lr_projector(torch.zeros(1, 3, 8, 16, 16).double())
    with pytest.raises(UserError, match="multiples of 16"):
        double.lr_projector(torch.zeros(1, 3, 9, 24, 16).double())
