"""`y, memory = f(x, memory)`: any split of a clip gives the whole clip's result, and time reaches as far as
the design says."""

import pytest
import torch

from flashvsr.base.cli import UserError
from flashvsr.config import ProjectorConfig, TCDecoderConfig, VAEConfig
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE


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


# ---- float32 and bfloat16 -------------------------------------------------------------------------------


def seeded_module(make, dtype):
    """With the weights that bfloat16 has, in any dtype; widths at which RMS norms are well conditioned."""
    torch.manual_seed(0)
    return make().requires_grad_(False).bfloat16().to(dtype)


def seeded_input(*shape, dtype):
    torch.manual_seed(1)
    return torch.randn(*shape).bfloat16().to(dtype)


def tc_decoder_ways(dtype, split):
    """The whole clip in one call, and in calls of `split` latents with memory."""
    decoder = seeded_module(lambda: TCDecoder(TCDecoderConfig((16, 12, 8, 8))), dtype)
    latent, lr = seeded_input(1, 16, 7, 4, 6, dtype=dtype), seeded_input(1, 3, 25, 32, 48, dtype=dtype)
    memory, parts, at, frame = None, [], 0, 0
    for n in split:
        frames = 4 * n - 3 * (at == 0)
        y, memory = decoder(latent[:, :, at : at + n], lr[:, :, frame : frame + frames], memory)
        parts.append(y)
        at, frame = at + n, frame + frames
    return decoder(latent, lr)[0], torch.cat(parts, 2)


def vae_ways(dtype, split, decode):
    vae = seeded_module(lambda: WanVAE(VAEConfig(dim=8)), dtype)
    x = seeded_input(*((1, 16, 7, 3, 4) if decode else (1, 3, 25, 24, 32)), dtype=dtype)
    half = vae.decode if decode else vae.encode
    memory, parts, at = None, [], 0
    for n in split:
        count = n if decode else 4 * n - 3 * (at == 0)
        y, memory = half(x[:, :, at : at + count], memory)
        parts.append(y)
        at += count
    return half(x)[0], torch.cat(parts, 2)


def projector_ways(dtype, split, mode):
    projector = seeded_module(lambda: LRProjector(ProjectorConfig(16, 16, 12, mode=mode)), dtype)
    video = seeded_input(1, 3, 29, 32, 48, dtype=dtype)
    memory, parts, at = None, [], 0
    for n in split:
        frames = 4 * n + (at == 0)
        (y,), memory = projector(video[:, :, at : at + frames], memory)
        parts.append(y)
        at += frames
    return projector(video)[0][0], torch.cat(parts, 1)


WAYS = {
    "tc decoder": tc_decoder_ways,
    "vae decode": lambda *args: vae_ways(*args, True),
    "vae encode": lambda *args: vae_ways(*args, False),
    "projector causal": lambda *args: projector_ways(*args, "causal"),
    "projector buffer": lambda *args: projector_ways(*args, "buffer"),
}


@pytest.mark.parametrize("name", WAYS)
def test_whole_equals_streaming_in_float32(name):
    for split in ([1] * 7, [2, 2, 3], [6, 1]):
        whole, streamed = WAYS[name](torch.float32, split)
        error = (whole - streamed).abs().max().item()
        print(f"\n{name} {split}: {error:.1e}")
        assert whole.shape == streamed.shape and error < 1e-5 and whole.std() > 1e-2


@pytest.mark.parametrize("name", WAYS)
def test_whole_and_streaming_in_bfloat16_differ_less_than_either_drifts(name):
    """Rule: their root mean square difference is at most what the farther of the two is away from float64
    arithmetic on the same bfloat16 weights and inputs."""
    whole, streamed = (y.double() for y in WAYS[name](torch.bfloat16, [2, 2, 3]))
    exact, _ = WAYS[name](torch.float64, [7])
    drift = max((y - exact).square().mean().sqrt().item() for y in (whole, streamed))
    apart = (whole - streamed).square().mean().sqrt().item()
    print(f"\n{name}: apart {apart:.1e}, drift {drift:.1e} of {exact.std():.2f}")
    assert 0 < drift < 0.1 * exact.std() and apart <= drift


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
