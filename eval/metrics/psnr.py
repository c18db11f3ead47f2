"""Peak signal-to-noise ratio on RGB frames."""

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frames import matched_frames


def psnr_per_frame(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
    """PSNR in dB of each frame, float64 `[F]` on the CPU; equal frames give inf.

    10·log10(1 / MSE), the error taken over all pixels and the three channels of one frame, peak 1. Clips
    and errors as in `matched_frames`.
    """
    errors = [(x - y).double().square().mean() for x, y in matched_frames(a, b)]
    return -10 * torch.log10(torch.stack(errors).cpu())


def psnr(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Mean over frames of `psnr_per_frame`, the usual clip value (not the PSNR of the clip's mean error)."""
    return psnr_per_frame(a, b).mean().item()
