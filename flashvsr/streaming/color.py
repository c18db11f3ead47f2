"""Colour correction of SR frames towards their LR frames, frame by frame.

Both work on `B 3 F H W` in [-1,1] and clamp at the end. Source: released code, checked in golden/.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr.base.cli import UserError

METHODS = ("adain", "wavelet", "none")


def correct(sr: Tensor, lr: Tensor, method: str) -> Tensor:
    """`sr` with the colours of `lr` (LR at output size), clamped to [-1,1].

    One frame at a time: a frame's result cannot depend on which frames came with it, and only one frame's
    filtering is in memory. UserError for an unknown method.
    """
    if method == "none":
        return sr.clamp(-1, 1)
    if method not in METHODS:
        raise UserError(f"color_fix={method!r} is unknown; there are {', '.join(METHODS)}")
    fix = {"adain": adain, "wavelet": wavelet}[method]
    out = torch.empty_like(sr)
    for i in range(sr.shape[2]):
        frame = slice(i, i + 1)
        out[:, :, frame] = fix(sr[:, :, frame], lr[:, :, frame]).clamp_(-1, 1)
    return out


def adain(sr: Tensor, lr: Tensor, eps: float = 1e-5) -> Tensor:
    """Gives every frame and channel the mean and standard deviation of its LR frame."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, dim=(-2, -1), correction=0, keepdim=True)
        return mean, (variance + eps).sqrt()

    mean_sr, std_sr = statistics(sr)
    mean_lr, std_lr = statistics(lr)
    return (sr - mean_sr) / std_sr * std_lr + mean_lr


def _low_pass(frames: Tensor, levels: int) -> Tensor:
    """Repeated [1,2,1]x[1,2,1]/16 of dilation 2^i, replicating at the border. `N C H W`."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=frames.dtype, device=frames.device)
    kernel = (line[:, None] * line[None] / 16).expand(frames.shape[1], 1, 3, 3)
    for level in range(levels):
        d = 2**level
        padded = F.pad(frames, (d, d, d, d), mode="replicate")
        frames = F.conv2d(padded, kernel, dilation=d, groups=frames.shape[1])
    return frames


def wavelet(sr: Tensor, lr: Tensor, levels: int = 5) -> Tensor:
    """The detail of `sr` above the low-pass of `lr`."""
    low = _low_pass((lr - sr).transpose(1, 2).flatten(0, 1), levels)
    return sr + low.unflatten(0, (sr.shape[0], sr.shape[2])).transpose(1, 2)
