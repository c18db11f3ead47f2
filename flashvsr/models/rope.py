"""3-D rotary position embedding, from indices in float64: no table, no longest clip.

Of a head of width d, rows and columns take 2*floor(d/6) channels each and time the rest, in the order
time | row | column; adjacent pairs are one complex number; base 10000.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvsr.models.norm import widen


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels for time, rows, columns. 128 -> 44, 42, 42."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def angles(positions: Tensor, width: int) -> Tensor:
    """`N` indices -> `N width/2` angles in float64."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return positions.double().cpu()[:, None] * frequencies


def grid_angles(frames: Tensor, rows: int, columns: int, head_dim: int) -> Tensor:
    """Angles of a token grid, `f rows columns head_dim/2`, float64. `frames` are temporal indices, `f`."""
    wt, wh, ww = axis_widths(head_dim)
    f = frames.shape[0]
    t = angles(frames, wt)[:, None, None].expand(f, rows, columns, -1)
    h = angles(torch.arange(rows), wh)[None, :, None].expand(f, rows, columns, -1)
    w = angles(torch.arange(columns), ww)[None, None].expand(f, rows, columns, -1)
    return torch.cat([t, h, w], -1)


def cos_sin(angle: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """float32 cosine and sine, computed in float64."""
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates `B T heads d` by cos, sin of shape `T d/2`; computed in float32, returned in x's dtype."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    even, odd = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
