"""Rectified flow: schedule, noising, velocity, and the Euler sampler.

    x_sigma = (1 - sigma) x0 + sigma eps        v = eps - x0        t = 1000 sigma
    shift:  sigma' = s sigma / (1 + (s - 1) sigma),  s = 5

Source: Lipman et al. 2023; Wan2.1's scheduler as in the released FlashVSR code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHIFT = 5.0


def shift_sigma(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """Moves noise levels in [0,1] towards 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Noise levels of an N-step sampler, from 1 downwards, without the final 0. float32 `N`."""
    return shift_sigma(torch.linspace(1, 0, steps + 1)[:-1], shift)


def training_weights(steps: int = 1000, shift: float = SHIFT) -> Tensor:
    """The bell of DiffSynth's scheduler over its N levels; ours trains unweighted. float32 `N`."""
    t = 1000 * sampling_sigmas(steps, shift)
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    y = y - y.min()
    return y * (1000 / y.sum())


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.to(like.device, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma for `x0`, `noise` of shape `B ...` and `sigma` of shape `B`."""
    s = _column(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The target v = eps - x0."""
    return noise - x0


def denoised(x_sigma: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_sigma - sigma v, for `sigma` of shape `B`."""
    return x_sigma - _column(sigma, x_sigma) * v


def euler(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Integrates dx = v dsigma from `noise` at sigmas[0] down to 0.

    `model(x, sigma of shape B)` gives the velocity. With one level, sigma = 1, this is x = noise - v.
    """
    x = noise
    levels = [*sigmas.tolist(), 0.0]
    for here, there in zip(levels[:-1], levels[1:], strict=True):
        x = x + (there - here) * model(x, x.new_full((x.shape[0],), here))
    return x
