"""Pixel losses on a window of decoded latents (paper section 3.2 and Eq. 3).

Of a clip's n latents, the causal decoder runs over the first s without gradient, only to fill its memory, and
over the next `count` with gradient; the loss sees the frames of those: max(0, 4s-3) ... 4(s+count)-4. The
gradient with respect to every other latent is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Decode = Callable[[int, int, Any], tuple[Tensor, Any]]  # first, last+1 latent, memory -> frames, memory

PIECE = 2  # latents decoded at once where no gradient is needed


def window_frames(first: int, count: int = 2) -> slice:
    """HR frames of latents first ... first + count - 1: latent 0 is frame 0, latent i is 4i-3 ... 4i."""
    return slice(max(0, 4 * first - 3), 4 * (first + count) - 3)


def decode_window(decode: Decode, first: int, count: int = 2) -> Tensor:
    """Frames `B 3 F H W` of latents first ... first+count-1, with gradient through those latents alone.

    What needs no gradient is decoded `PIECE` latents at a time: at once, a clip of the paper's
    size would take 235 GiB.
    """
    with torch.no_grad():
        memory = fill(decode, first)
    if torch.is_grad_enabled():
        return decode(first, first + count, memory)[0]
    frames = []
    for start in range(first, first + count, PIECE):
        part, memory = decode(start, min(start + PIECE, first + count), memory)
        frames.append(part)
    return torch.cat(frames, 2)


def fill(decode: Decode, stop: int) -> Any:
    """The decoder's memory after latents 0 ... stop-1 (None for none of them)."""
    memory = None
    for start in range(0, stop, PIECE):
        _, memory = decode(start, min(start + PIECE, stop), memory)
    return memory


def mse(sr: Tensor, hr: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error per sample, `B`; `B 3 F H W` in [-1,1], not clamped; `weights` of frames, `F`."""
    return mean_of_frames((sr.float() - hr.float()).square().mean((1, 3, 4)), weights)


def mean_of_frames(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """`B F` -> `B`."""
    return values.mean(1) if weights is None else (values * weights).sum(1) / weights.sum()


def frame_weights(first: int, frames: int, first_frame: float, device: torch.device) -> Tensor | None:
    """Weights of the frames of a window whose first latent is `first`: frame 0 of the clip counts
    `first_frame` times as much as any other; None where all count the same."""
    if first > 0 or first_frame == 1:
        return None
    weights = torch.ones(frames, device=device)
    weights[0] = first_frame
    return weights


def difference(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared error per sample, `B`, of the change from each frame to the next (`B 3 F H W`, F > 1)."""
    return mse(sr[:, :, 1:] - sr[:, :, :-1], hr[:, :, 1:] - hr[:, :, :-1])


def lpips_frames(
    lpips: Callable[[Tensor, Tensor], Tensor],
    sr: Tensor,
    hr: Tensor,
    weights: Tensor | None = None,
    *,
    frame_by_frame: bool = False,
) -> Tensor:
    """LPIPS averaged over a clip's frames (`weights`, `F`), `B`.

    `frame_by_frame` computes one frame at a time, and again in the backward pass: features of one frame in
    memory.
    """
    x, y = (clip.float().transpose(1, 2) for clip in (sr, hr))
    if not frame_by_frame:
        return mean_of_frames(lpips(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2]), weights)
    pairs = zip(x.unbind(1), y.unbind(1), strict=True)
    values = torch.stack([checkpoint(lpips, a, b, use_reentrant=False) for a, b in pairs], 1)
    return mean_of_frames(values, weights)
