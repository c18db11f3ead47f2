"""Gaussian and Poisson noise, in the [0, 1] law of the original code (RealBasicVSR, Real-ESRGAN).

Kind and gray flag hold for a clip, the strength walks, the noise itself is new in every frame.
"""

import numpy as np
import torch

from data.degradation.presets import Noise, choose

GRAY = torch.tensor([0.299, 0.587, 0.114])  # BT.601 luma


def draw(config: Noise, frames: int, rng: np.random.Generator) -> dict:
    kind = choose(config.kinds, rng)
    gray = bool(rng.uniform() < config.gray)
    strength = (config.sigma if kind == "gaussian" else config.scale).draw(frames, rng)
    return {"kind": kind, "gray": gray, "strength": strength.tolist()}


def gaussian(frame: torch.Tensor, sigma: float, gray: bool, generator: torch.Generator) -> torch.Tensor:
    """`frame` `C H W` in [0, 1] plus normal noise of standard deviation `sigma` (8-bit levels), clipped."""
    shape = (1, *frame.shape[1:]) if gray else frame.shape
    return (frame + torch.randn(shape, generator=generator) * (sigma / 255)).clamp_(0, 1)


def poisson(frame: torch.Tensor, scale: float, gray: bool, generator: torch.Generator) -> torch.Tensor:
    """`frame` `C H W` in [0, 1] plus `scale` times photon noise, clipped.

    As many photons at white as the picture has distinct 8-bit levels, rounded up to a power of two (256 for
    natural pictures): noise of standard deviation sqrt(value / photons), i.e. 11.3 levels x scale at 0.5.
    """
    source = (GRAY[:, None, None] * frame).sum(0, keepdim=True) if gray else frame
    levels = (source * 255).round().clamp_(0, 255)
    distinct = int((torch.bincount(levels.flatten().long(), minlength=256) > 0).sum())
    photons = 2 ** (distinct - 1).bit_length()
    clean = levels / 255
    noise = torch.poisson(clean * photons, generator=generator) / photons - clean
    return (frame + noise * scale).clamp_(0, 1)


def apply(frame: torch.Tensor, params: dict, index: int, generator: torch.Generator) -> torch.Tensor:
    """Adds the noise that `draw` gave frame `index` to `frame` `C H W` in [0, 1]."""
    add = gaussian if params["kind"] == "gaussian" else poisson
    return add(frame, params["strength"][index], params["gray"], generator)
