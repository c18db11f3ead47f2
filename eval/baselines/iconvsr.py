"""IconVSR (Chan et al. 2021): BasicVSR with refilled keyframes and coupled propagation, with BasicSR's names.

At every fifth frame and the last one, features that EDVR computes from the neighbouring frames are mixed
into what is propagated; the forward pass also reads the backward pass's features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.baselines.basicvsr import SCALE, Memory, Recurrent
from eval.baselines.edvr import EDVRFeatures
from eval.baselines.spynet import WIDTHS

KEYFRAME_STRIDE = 5
MULTIPLE = 4  # sizes that EDVR's pyramid takes


class IconVSR(Recurrent):
    """The released models have width 64 and 30 blocks per direction: 8.69 M parameters.

    window: frames that EDVR sees around a keyframe; edvr_blocks, groups: its residual blocks and groups of
    deformable channels.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 30,
        detail: int = 64,
        flow_widths: Sequence[int] = WIDTHS,
        window: int = 5,
        edvr_blocks: int = 5,
        groups: int = 8,
        keyframe_stride: int = KEYFRAME_STRIDE,
    ):
        super().__init__(width, blocks, detail, flow_widths, forward_in=2 * width + 3)
        self.window, self.keyframe_stride = window, keyframe_stride
        self.edvr = EDVRFeatures(width, window, edvr_blocks, groups)
        self.backward_fusion = nn.Conv2d(2 * width, width, 3, padding=1)
        self.forward_fusion = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(
        self,
        frames: Tensor,
        memory: Memory | None = None,
        behind: int = 0,
        ahead: int = 0,
        start: int = 0,
    ) -> tuple[Tensor, Memory]:
        """As BasicVSR's. Keyframes: every fifth frame of the clip, and the last of these.

        H and W of at least 4: smaller ones cannot be reflected up to multiples of 4.
        """
        height, width = frames.shape[-2:]
        frames = _padded(frames)
        key = self._keyframe_features(frames, start)
        future = self._backward(frames, key)
        out = []
        for i in range(frames.shape[1] - ahead):
            frame = frames[:, i]
            past = self.moved(memory, frame)
            if i in key:
                past = self.forward_fusion(torch.cat([past, key[i]], 1))
            hidden = self.forward_trunk(torch.cat([frame.to(past.dtype), future.pop(), past], 1))
            memory = Memory(hidden, frame)
            if i >= behind:
                large = self.reconstruct(hidden, frame)
                out.append(large[..., : SCALE * height, : SCALE * width])
        return torch.stack(out, 1), memory

    def _backward(self, frames: Tensor, key: dict[int, Tensor]) -> list[Tensor]:
        """The backward pass's features, from the last frame to the first."""
        features: list[Tensor] = []
        memory = None
        for i in reversed(range(frames.shape[1])):
            frame = frames[:, i]
            past = self.moved(memory, frame)
            if i in key:
                past = self.backward_fusion(torch.cat([past, key[i]], 1))
            features.append(self.backward_trunk(torch.cat([frame.to(past.dtype), past], 1)))
            memory = Memory(features[-1], frame)
        return features

    def _keyframe_features(self, frames: Tensor, start: int) -> dict[int, Tensor]:
        count = frames.shape[1]
        dtype = self.conv_last.weight.dtype
        return {
            i: self.edvr(frames[:, window_around(i, count, self.window)].to(dtype))
            for i in sorted({*range(-start % self.keyframe_stride, count, self.keyframe_stride), count - 1})
        }


def window_around(i: int, count: int, size: int) -> list[int]:
    """The `size` frames around frame i of `count`.

    Beyond the ends stand frames from inside, at the same distance from the frame that is `size // 2` from the
    end: frames 4 and 3 before the first, with five. Clips shorter than the window, which BasicSR's code does
    not take, give the nearest frame they have.
    """
    reach = size // 2
    window = range(i - reach, i + reach + 1)
    inside = [reach - j if j < 0 else 2 * (count - 1) - reach - j if j >= count else j for j in window]
    return [min(max(j, 0), count - 1) for j in inside]


def _padded(frames: Tensor) -> Tensor:
    """Reflected at the bottom and the right up to multiples of 4."""
    down, right = -frames.shape[-2] % MULTIPLE, -frames.shape[-1] % MULTIPLE
    flat = F.pad(frames.flatten(0, 1), (0, right, 0, down), mode="reflect")
    return flat.unflatten(0, frames.shape[:2])
