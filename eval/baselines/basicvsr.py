"""BasicVSR (Chan et al. 2021): propagation in both directions along the optical flow, with BasicSR's names.

A backward pass goes from the last frame to the first, then a forward pass gives the frames out. Nothing can
come out before the last frame of what is given has been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.baselines.spynet import WIDTHS, SPyNet, warp

SCALE = 4
SLOPE = 0.1  # of every LeakyReLU


class Memory(NamedTuple):
    """What one pass hands on: its features `B C H W` of a frame, and that frame `B 3 H W`."""

    hidden: Tensor
    frame: Tensor


class ResidualBlock(nn.Module):
    """x + conv(ReLU(conv(x))), without normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Trunk(nn.Module):
    """A convolution to `width` channels, then residual blocks."""

    def __init__(self, c_in: int, width: int, blocks: int):
        super().__init__()
        stack = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.main = nn.Sequential(nn.Conv2d(c_in, width, 3, padding=1), nn.LeakyReLU(SLOPE), stack)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class Recurrent(nn.Module):
    """What BasicVSR and IconVSR share: flow, one trunk per direction, features to frames.

    width: of the features; detail: channels at full size; forward_in: what the forward trunk reads.
    """

    def __init__(self, width: int, blocks: int, detail: int, flow_widths: Sequence[int], forward_in: int):
        super().__init__()
        self.width = width
        self.spynet = SPyNet(flow_widths)
        self.backward_trunk = Trunk(width + 3, width, blocks)
        self.forward_trunk = Trunk(forward_in, width, blocks)
        self.upconv1 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.upconv2 = nn.Conv2d(width, 4 * detail, 3, padding=1)
        self.conv_hr = nn.Conv2d(detail, detail, 3, padding=1)
        self.conv_last = nn.Conv2d(detail, 3, 3, padding=1)

    def moved(self, memory: Memory | None, frame: Tensor) -> Tensor:
        """The features of a neighbouring frame moved onto this one; zeros where there is no neighbour."""
        if memory is None:
            shape = (frame.shape[0], self.width, *frame.shape[-2:])
            return torch.zeros(shape, dtype=self.conv_last.weight.dtype, device=frame.device)
        return warp(memory.hidden, self.spynet(frame, memory.frame))

    def reconstruct(self, features: Tensor, frame: Tensor) -> Tensor:
        """A frame four times as large: two pixel shuffles, added to the frame's bilinear interpolation."""
        for conv in (self.upconv1, self.upconv2):
            features = F.leaky_relu(F.pixel_shuffle(conv(features), 2), SLOPE)
        detail = self.conv_last(F.leaky_relu(self.conv_hr(features), SLOPE))
        base = F.interpolate(frame, scale_factor=SCALE, mode="bilinear", align_corners=False)
        return base + detail.to(base.dtype)


class BasicVSR(Recurrent):
    """The released models: width 64, 30 blocks per direction, 6.29 M parameters (1.44 M of them flow)."""

    def __init__(
        self, width: int = 64, blocks: int = 30, detail: int = 64, flow_widths: Sequence[int] = WIDTHS
    ):
        super().__init__(width, blocks, detail, flow_widths, forward_in=width + 3)
        self.fusion = nn.Conv2d(2 * width, width, 1)

    def forward(
        self,
        frames: Tensor,
        memory: Memory | None = None,
        behind: int = 0,
        ahead: int = 0,
        start: int = 0,
    ) -> tuple[Tensor, Memory]:
        """`B F 3 H W` in [0, 1], float32, to `B F-behind-ahead 3 4H 4W`, unclamped, and the memory.

        memory: of the frames before these (None: nothing is known of them). The first `behind` and the last
        `ahead` frames are context: propagated through, not reconstructed; the memory stands before the
        latter. start: index in the clip of the first of these frames, which matters to IconVSR only.
        Features have the dtype of the weights; flow and frames stay float32.
        """
        future = self._backward(frames, behind)
        out = []
        for i in range(frames.shape[1] - ahead):
            frame = frames[:, i]
            hidden = self.forward_trunk(_beside(frame, self.moved(memory, frame)))
            memory = Memory(hidden, frame)
            if i >= behind:
                both = torch.cat([future.pop(), hidden], 1)
                out.append(self.reconstruct(F.leaky_relu(self.fusion(both), SLOPE), frame))
        return torch.stack(out, 1), memory

    def _backward(self, frames: Tensor, first: int) -> list[Tensor]:
        """The backward pass's features of the frames from the last to `first`, in this order."""
        features: list[Tensor] = []
        memory = None
        for i in reversed(range(first, frames.shape[1])):
            frame = frames[:, i]
            features.append(self.backward_trunk(_beside(frame, self.moved(memory, frame))))
            memory = Memory(features[-1], frame)
        return features


def _beside(frame: Tensor, features: Tensor) -> Tensor:
    return torch.cat([frame.to(features.dtype), features], 1)
