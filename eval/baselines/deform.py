"""Modulated deformable convolution (DCNv2, Zhu et al. 2019) with plain tensor operations.

One way for every device: torchvision's operator is an optional binary that does not load with every torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 9  # of a 3x3 kernel


def deform_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution, stride 1, padding 1, whose taps are moved and weighed at every place.

    x: `B C H W`. offset: `B G·18 H W`, for each of G groups of input channels and each tap (row by row) the
    way down and to the right, in pixels. mask: `B G·9 H W`. weight: `O C 3 3`. What lies outside of x is
    zero, as are the missing corners of a place half outside. As `torchvision.ops.deform_conv2d`.
    """
    batch, channels, height, width = x.shape
    groups = mask.shape[1] // TAPS
    offset = offset.float() if x.dtype in (torch.bfloat16, torch.float16) else offset
    offset = offset.reshape(batch * groups, TAPS, 2, height, width)
    mask = mask.reshape(batch * groups, TAPS, 1, height, width)
    source = x.reshape(batch * groups, channels // groups, height, width).to(offset.dtype)
    rows = torch.arange(height, device=x.device, dtype=offset.dtype)[:, None]
    columns = torch.arange(width, device=x.device, dtype=offset.dtype)
    out = 0
    for tap in range(TAPS):  # one tap at a time: memory stays at a copy of x
        down = rows + (tap // 3 - 1) + offset[:, tap, 0]
        right = columns + (tap % 3 - 1) + offset[:, tap, 1]
        grid = torch.stack(((2 * right + 1) / width - 1, (2 * down + 1) / height - 1), -1)
        seen = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        seen = (seen.to(x.dtype) * mask[:, tap]).reshape(x.shape)
        out = out + F.conv2d(seen, weight[:, :, tap // 3, tap % 3, None, None])
    return out if bias is None else out + bias[:, None, None]


class DeformConv(nn.Module):
    """The convolution with its own offsets and masks, computed from `guide` by `conv_offset`."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        self.conv_offset = nn.Conv2d(width, 3 * TAPS * groups, 3, padding=1)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Both `B C H W`."""
        down_right, mask = self.conv_offset(guide).tensor_split([self.conv_offset.out_channels * 2 // 3], 1)
        return deform_conv(x, down_right, mask.sigmoid(), self.weight, self.bias)
