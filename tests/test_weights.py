"""The weights that the demo starts from are what weights/README.md says: small, for scale=tiny, trained."""

from pathlib import Path

import pytest
import torch

import flashvsr
from flashvsr.base.resize import bicubic_8bit, to_signed
from flashvsr.config import PRESETS
from train.stages.decoder import fresh_decoder
from train.stages.vae import fresh_vae

WEIGHTS = Path(__file__).parents[1] / "weights" / "tiny"


@pytest.fixture(scope="module")
def picture():
    """Moving tiles with edges, uint8 `3 13 64 64`."""
    t, y, x = torch.meshgrid(torch.arange(13), torch.arange(64), torch.arange(64), indexing="ij")
    tiles = [torch.sign(torch.sin(x / (7 + c) + 0.2 * t) * torch.cos(y / 6 - 0.1 * t)) for c in range(3)]
    return (127.5 + 60 * torch.stack(tiles)).round().to(torch.uint8)


def psnr(a, b):
    return -10 * torch.log10(((a.clamp(-1, 1) - b) ** 2).mean() / 4).item()


def test_they_are_small_and_in_half_precision():
    files = [WEIGHTS / "vae" / "Wan2.1_VAE.pth", WEIGHTS / "decoder" / "TCDecoder.ckpt"]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    for path in files:
        state = torch.load(path, weights_only=True)
        assert all(t.dtype == torch.float16 and t.isfinite().all() for t in state.values())


@torch.no_grad()
def test_the_vae_and_the_decoder_are_trained(picture):
    vae = flashvsr.load(WEIGHTS / "vae", parts=("vae",)).vae
    decoder = flashvsr.load(WEIGHTS / "decoder", parts=("tc_decoder",)).tc_decoder
    assert vae.config.dim == PRESETS["tiny"].vae.dim
    assert decoder.config == PRESETS["tiny"].tc_decoder
    hr = to_signed(picture)[None]
    latents, _ = vae.encode(hr)
    torch.manual_seed(0)
    untrained = fresh_vae(PRESETS["tiny"].vae)
    assert psnr(vae.decode(latents)[0], hr) > psnr(untrained.decode(untrained.encode(hr)[0])[0], hr) + 5
    noise = 20 * torch.randn(1, 3, 13, 16, 16, generator=torch.Generator().manual_seed(0))
    lr = (picture[None, :, :, ::4, ::4] + noise).clamp(0, 255).to(torch.uint8)
    lr = to_signed(bicubic_8bit(lr, (64, 64)))
    before = psnr(fresh_decoder(PRESETS["tiny"].tc_decoder)(latents, lr)[0], hr)
    assert psnr(decoder(latents, lr)[0], hr) > before + 0.2
    assert 0.7 < latents.std() < 1.5  # normalised by its own statistics
