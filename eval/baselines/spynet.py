"""SPyNet: optical flow from coarse to fine (Ranjan and Black 2017), with the tensor names of BasicSR.

A pyramid of halved pictures; every level doubles the flow of the coarser one, warps the other picture with it
and adds what a small convolutional network sees is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
WIDTHS, LEVELS = (32, 64, 32, 16), 6


def warp(x: Tensor, flow: Tensor, padding: str = "zeros") -> Tensor:
    """`x` fetched from where the flow points: out[p] = x[p + flow[p]], bilinear.

    x: `B C H W`; flow: `B 2 H W`, pixels to the right and downwards. padding: what lies outside, "zeros" or
    "border". Positions are computed in the flow's precision, whatever that of x.
    """
    height, width = x.shape[-2:]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    grid = torch.stack(
        (
            2 * (columns + flow[:, 0]) / max(width - 1, 1) - 1,
            2 * (rows + flow[:, 1]) / max(height - 1, 1) - 1,
        ),
        -1,
    )
    out = F.grid_sample(x.to(flow.dtype), grid, mode="bilinear", padding_mode=padding, align_corners=True)
    return out.to(x.dtype)


class Level(nn.Module):
    """Five 7x7 convolutions from (reference, warped other, flow so far: 8 channels) to a correction."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        channels = [8, *widths, 2]
        layers: list[nn.Module] = []
        for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.Conv2d(c_in, c_out, 7, padding=3), nn.ReLU()]
        self.basic_module = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_module(x)


class SPyNet(nn.Module):
    """Flow from one picture to another, both `B 3 H W` in [0, 1], of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, widths: Sequence[int] = WIDTHS, levels: int = LEVELS):
        super().__init__()
        self.basic_module = nn.ModuleList(Level(widths) for _ in range(levels))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, reference: Tensor, other: Tensor) -> Tensor:
        """`B 2 H W`, pixels: `warp(other, flow)` looks like `reference`.

        Pictures are stretched to multiples of the coarsest level's step (32 pixels with six levels), the
        flow is brought back and scaled in both axes.
        """
        height, width = reference.shape[-2:]
        step = 2 ** (len(self.basic_module) - 1)
        size = (-(-height // step) * step, -(-width // step) * step)
        flow = self._coarse_to_fine(self._stretched(reference, size), self._stretched(other, size))
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor([width / size[1], height / size[0]]).view(1, 2, 1, 1)

    def _stretched(self, picture: Tensor, size: tuple[int, int]) -> Tensor:
        picture = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)
        return (picture - self.mean) / self.std

    def _coarse_to_fine(self, reference: Tensor, other: Tensor) -> Tensor:
        pyramid = [(reference, other)]
        for _ in self.basic_module[1:]:
            pyramid.insert(0, tuple(F.avg_pool2d(x, 2) for x in pyramid[0]))
        # The coarsest level starts from no motion, so pictures of a single pixel need no exception.
        reference = pyramid[0][0]
        flow = reference.new_zeros(reference.shape[0], 2, *reference.shape[-2:])
        for i, (level, (reference, other)) in enumerate(zip(self.basic_module, pyramid, strict=True)):
            if i > 0:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            flow = flow + level(torch.cat([reference, warp(other, flow, "border"), flow], 1))
        return flow
