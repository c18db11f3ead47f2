"""Peak signal-to-noise ratio on RGB frames or on their Y."""

import math

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frames import matched_frames
from eval.metrics.scoring import Metric


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    """10·log10(1 / MSE) of each frame, stacks `n C H W` in [0, 1] -> float64 `n`; inf where equal."""
    # The norm adds up in float64 without a float64 copy of the frames.
    norm = torch.linalg.vector_norm(x - y, dim=(1, 2, 3), dtype=torch.float64)
    return 10 * math.log10(x[0].numel()) - 20 * torch.log10(norm)


@torch.no_grad()
def psnr_per_frame(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
    """PSNR in dB of each frame, float64 `[F]` on the CPU; equal frames give inf.

    10·log10(1 / MSE), the error taken over all pixels and the three channels of one frame, peak 1. Clips
    and errors as in `matched_frames`.
    """
    return torch.cat([_psnr(x[None], y[None]) for x, y in matched_frames(a, b)]).cpu()


def psnr(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Mean over frames of `psnr_per_frame`, the usual clip value (not the PSNR of the clip's mean error)."""
    return psnr_per_frame(a, b).mean().item()


PSNR = Metric(
    key="psnr",
    title="PSNR",
    higher=True,
    digits=2,
    description="PSNR v1: dB, RGB, peak 255, error over the pixels and channels of a frame, mean over frames",
    measure=lambda frames: _psnr(frames.sr.rgb, frames.hr.rgb),
)

# BasicSR keeps the peak at 255 although studio-range Y spans 219 levels, and so does everyone who compares.
PSNR_Y = Metric(
    key="psnr_y",
    title="PSNR-Y",
    higher=True,
    digits=2,
    description="PSNR v1: dB, studio-range BT.601 Y (16 to 235, not rounded), peak 255, mean over frames",
    measure=lambda frames: _psnr(frames.sr.y, frames.hr.y),
)
