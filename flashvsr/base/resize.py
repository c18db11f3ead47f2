"""Resizing of 8-bit pictures, and the way between 8-bit pixels and [-1, 1].

The released pipeline upsamples the LR frames with Pillow's bicubic on 8-bit pixels and only then goes to
[-1, 1]; training and inference must see the same pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

_A = -0.5  # Pillow's bicubic (Catmull-Rom); OpenCV and torch without antialias use -0.75


def bicubic_8bit(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pillow's bicubic on 8-bit pixels: uint8 [..., H, W] -> uint8 [..., h, w], `size` = (h, w).

    Width first, then height, each pass rounded to 8 bits; antialiased when shrinking. Within one level of
    `PIL.Image.resize(..., BICUBIC)` on every device (recent Pillow takes the height first where only the
    height shrinks: there it is the two passes that agree). TypeError when `x` is not uint8.
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"bicubic_8bit takes uint8 pixels, not {x.dtype}")
    height, width = size = tuple(size)
    if (height, width) == tuple(x.shape[-2:]) or x.numel() == 0:
        return x.new_empty(*x.shape[:-2], height, width) if x.numel() == 0 else x.clone()
    if x.device.type == "cpu":
        planes = x.reshape(-1, *x.shape[-2:])
        # Three planes travel together: torch's fast 8-bit path takes RGB pictures (but fails on 1x1 results).
        group = 3 if planes.shape[0] % 3 == 0 and size != (1, 1) else 1
        pictures = planes.reshape(-1, group, *planes.shape[-2:])
        out = F.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True)
        return out.reshape(*x.shape[:-2], height, width)
    return _two_passes(x, height, width)


def _two_passes(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The same with plain tensor operations, for devices without an 8-bit kernel."""
    x = _pass(x, width)
    return _pass(x.transpose(-1, -2), height).transpose(-1, -2).contiguous()


def _pass(x: torch.Tensor, size: int) -> torch.Tensor:
    if x.shape[-1] == size:
        return x
    index, weight = _taps(x.shape[-1], size, x.device)
    total = torch.zeros(*x.shape[:-1], size, dtype=torch.float32, device=x.device)
    for k in range(index.shape[0]):
        total.addcmul_(x.index_select(-1, index[k]).float(), weight[k])
    return total.round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(source: int, target: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Source indices and weights of every target pixel, [taps, target]; as Pillow's precompute_coeffs."""
    scale = source / target
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    taps = 2 * math.ceil(support) + 1
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).floor().clamp(min=0)
    last = (centre + support + 0.5).floor().clamp(max=source)
    index = first + torch.arange(taps, dtype=torch.float64)[:, None]
    distance = ((index - centre + 0.5) / stretch).abs()
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    weight = weight * (index < last)
    weight = weight / weight.sum(0)
    index = index.clamp(max=source - 1).long()
    return index.to(device), weight.float().to(device)


def to_signed(x: torch.Tensor) -> torch.Tensor:
    """8-bit pixels to float32 in [-1, 1]: x / 127.5 - 1."""
    return x.float() / 127.5 - 1.0


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to 8-bit pixels: the inverse of `to_signed`, rounded and clipped."""
    return ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
