"""Structural similarity on RGB frames or on their Y (Wang, Bovik, Sheikh, Simoncelli 2004)."""

import math

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frames import matched_frames
from eval.metrics.scoring import Metric

_SIZE, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_STRIP = {False: 2**18, True: 2**26}  # values of one map handled at once, on a CPU and on a GPU
_HALF = [math.exp(-((i - _SIZE // 2) ** 2) / (2 * _SIGMA**2)) for i in range(_SIZE // 2 + 1)]
_TAPS = [tap / (2 * sum(_HALF) - 1) for tap in _HALF]  # outermost first, the centre (weight 1) last


def _gaussian(x: Tensor) -> Tensor:
    """Separable Gaussian over the last two dimensions, valid positions only: `... H W -> ... H-10 W-10`.

    Shifted adds: on a CPU six times faster than a one-channel convolution.
    """
    for dim in (-2, -1):
        reach = len(_TAPS) - 1
        size = x.shape[dim] - 2 * reach
        y = x.narrow(dim, reach, size) * _TAPS[reach]
        for i, tap in enumerate(_TAPS[:reach]):
            y.add_(x.narrow(dim, i, size), alpha=tap).add_(x.narrow(dim, 2 * reach - i, size), alpha=tap)
        x = y
    return x


def _strip(x: Tensor, y: Tensor) -> Tensor:
    """SSIM summed over channels and places of each frame, `n C h W` -> float64 `n`."""
    # Four filtered maps are enough: the two variances appear only as a sum.
    mean_x, mean_y, square, product = _gaussian(torch.stack([x, y, x * x + y * y, x * y]))
    luminance, energy = mean_x * mean_y, mean_x**2 + mean_y**2
    numerator = (2 * luminance + _C1) * (2 * (product - luminance) + _C2)
    return (numerator / ((energy + _C1) * (square - energy + _C2))).sum(dim=(1, 2, 3), dtype=torch.float64)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each frame of two stacks `n C H W` in [0, 1], float64 `n`.

    In strips of rows that overlap by the window: the same places, a fraction of the memory, and on a CPU
    maps that stay in its cache.
    """
    reach, (height, width) = _SIZE - 1, x.shape[2:]
    rows = max(_SIZE, _STRIP[x.device.type != "cpu"] // (width * x.shape[0] * x.shape[1]))
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for top in range(0, height - reach, rows):
        size = min(rows + reach, height - top)
        total += _strip(x.narrow(2, top, size), y.narrow(2, top, size))
    return total / (x.shape[1] * (height - reach) * (width - reach))


@torch.no_grad()
def ssim_per_frame(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
    """SSIM of each frame, float64 `[F]` on the CPU.

    Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, range 1, population covariances; each
    channel alone, positions where the window fits, then the mean (section 3.3 of the paper). Clips and
    errors as in `matched_frames`; frames under 11 pixels raise ValueError.
    """
    if min(a.shape[1:3], default=_SIZE) < _SIZE:
        raise ValueError(
            f"SSIM needs frames of at least {_SIZE}x{_SIZE} pixels, got {a.shape[1]}x{a.shape[2]}"
        )
    return torch.cat([_ssim(x[None], y[None]) for x, y in matched_frames(a, b)]).cpu()


def ssim(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """Mean over frames of `ssim_per_frame`."""
    return ssim_per_frame(a, b).mean().item()


_WINDOW = "Gaussian window 11, sigma 1.5, no padding, K1 .01, K2 .03"

SSIM = Metric(
    key="ssim",
    title="SSIM",
    higher=True,
    digits=4,
    description=f"SSIM v1: RGB, mean over channels, {_WINDOW}, range 255, mean over frames",
    measure=lambda frames: _ssim(frames.sr.rgb, frames.hr.rgb),
    least=_SIZE,
)

SSIM_Y = Metric(
    key="ssim_y",
    title="SSIM-Y",
    higher=True,
    digits=4,
    description=f"SSIM v1: studio-range BT.601 Y (16 to 235, not rounded), {_WINDOW}, range 255, "
    "mean over frames",
    measure=lambda frames: _ssim(frames.sr.y, frames.hr.y),
    least=_SIZE,
)
