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


def grid_rope(
    frames: Tensor, rows: int, columns: int, head_dim: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle of a token grid, float32 `f rows columns head_dim/2` on the device.

    `frames` are temporal indices, `f`. Computed in float64 along each axis, then spread over the grid.
    """
    wt, wh, ww = axis_widths(head_dim)
    axes = angles(frames, wt), angles(torch.arange(rows), wh), angles(torch.arange(columns), ww)
    f = frames.shape[0]

    def spread(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
        parts = t[:, None, None], h[None, :, None], w[None, None]
        return torch.cat([part.expand(f, rows, columns, -1) for part in parts], -1)

    cos, sin = ([of(x).float().to(device) for x in axes] for of in (torch.cos, torch.sin))
    return spread(*cos), spread(*sin)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates `B T heads d` by cos, sin of shape `T d/2`; computed in float32, returned in x's dtype."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    even, odd = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
