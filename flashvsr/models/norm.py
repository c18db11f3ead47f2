"""RMS norms in at least float32, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """float32, or float64 where x already is that."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class ChannelRMS(nn.Module):
    """x / ||x||_2 * sqrt(C) * gamma over the channels of `... C H W` (Wan's VAE, LR Proj-In).

    `gamma` is `C 1 1 1` in files (`C 1 1` in the VAE's attention): `ones` counts the trailing ones.
    """

    def __init__(self, channels: int, ones: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * ones))

    def forward(self, x: Tensor) -> Tensor:
        y = widen(x)
        # the norm written out: the library's is several times slower over a strided axis on a CPU
        length = y.square().sum(-3, keepdim=True).clamp_min(1e-24).sqrt()
        return (y * (x.shape[-3] ** 0.5 / length) * self.gamma.reshape(-1, 1, 1)).to(x.dtype)


class TokenRMS(nn.Module):
    """x / rms(x) * weight over the last axis (the DiT's q and k, over the full width, before heads)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = widen(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)
