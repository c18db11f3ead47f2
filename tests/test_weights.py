"""The weights that the demo starts from are what weights/README.md says: small, for scale=tiny, trained."""

from pathlib import Path

import numpy as np
import torch

import flashvsr
from data import synthetic
from data.degradation import pipeline, preset
from flashvsr.base.resize import bicubic_8bit, to_signed
from flashvsr.config import PRESETS
from train.stages.decoder import fresh_decoder
from train.stages.vae import fresh_vae

WEIGHTS = Path(__file__).parents[1] / "weights" / "tiny"


def psnr(a, b):
    return -10 * torch.log10(((a.clamp(-1, 1) - b) ** 2).mean() / 4).item()


def test_they_are_small_and_in_half_precision():
    files = [WEIGHTS / "vae" / "Wan2.1_VAE.pth", WEIGHTS / "decoder" / "TCDecoder.ckpt"]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    for path in files:
        state = torch.load(path, weights_only=True)
        assert all(t.dtype == torch.float16 and t.isfinite().all() for t in state.values())


@torch.no_grad()
def test_they_are_trained():
    """On a procedural clip, which they have not seen, against where training began: the VAE, and the TC
    decoder on the VAE's latents and degraded LR."""
    frames = np.ascontiguousarray(synthetic.clip(0, 0)[:13, :96, :128])
    parameters = pipeline.draw(preset("realbasicvsr"), 13, 96, 128, 4, np.random.default_rng(0))
    degraded = np.stack(list(pipeline.stream(iter(frames), parameters)))
    hr, lr = (torch.from_numpy(x).permute(3, 0, 1, 2)[None] for x in (frames, degraded))
    hr, lr = to_signed(hr), to_signed(bicubic_8bit(lr, (96, 128)))

    vae = flashvsr.load(WEIGHTS / "vae", parts=("vae",)).vae
    decoder = flashvsr.load(WEIGHTS / "decoder", parts=("tc_decoder",)).tc_decoder
    torch.manual_seed(0)
    first_vae, first_decoder = fresh_vae(PRESETS["tiny"].vae), fresh_decoder(PRESETS["tiny"].tc_decoder)
    latents, _ = vae.encode(hr)
    assert 0.7 < latents.std() < 1.5  # normalised by its own statistics
    assert psnr(vae.decode(latents)[0], hr) > psnr(first_vae.decode(first_vae.encode(hr)[0])[0], hr) + 5
    assert psnr(decoder(latents, lr)[0], hr) > psnr(first_decoder(latents, lr)[0], hr) + 0.5
