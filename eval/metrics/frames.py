"""Frames as metrics see them: checked once, converted once, and shared by all metrics."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# BT.601 luma weights; the studio-range Y of MATLAB's rgb2ycbcr and BasicSR is 16 + 219 times their sum.
LUMA = (0.299, 0.587, 0.114)
STUDIO = (65.481, 128.553, 24.966)


class Stack:
    """A few consecutive frames of one clip, with what metrics make of them.

    `pixels` is uint8 `n H W 3`; `before` is the stack in front of it in the clip, or None at its start.
    """

    def __init__(self, pixels: Tensor, before: "Stack | None" = None):
        self.pixels = pixels
        self.before = before
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key and kept as long as the stack is."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def rgb(self) -> Tensor:
        """float32 `n 3 H W` in [0, 1]."""
        return self.once("rgb", lambda: unit(self.pixels))

    @property
    def y(self) -> Tensor:
        """Studio-range BT.601 luma, float32 `n 1 H W` in [16/255, 235/255], not rounded: `studio_luma`."""
        return self.once("y", lambda: studio_luma(self.rgb))


def unit(frames: Tensor) -> Tensor:
    """`... H W 3`, uint8 in 0...255 or floating point in [0, 1] -> float32 `... 3 H W` in [0, 1]."""
    frames = frames.detach().movedim(-1, -3)
    if frames.dtype == torch.uint8:
        return frames.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if frames.is_floating_point():
        return frames.float()
    raise ValueError(f"a metric takes uint8 or floating-point frames, got {frames.dtype}")


def studio_luma(rgb: Tensor) -> Tensor:
    """Y of BT.601 in studio range over 255, `... 3 H W` in [0, 1] -> `... 1 H W` in [16/255, 235/255].

    (16 + 65.481 R + 128.553 G + 24.966 B) / 255, as BasicSR's `bgr2ycbcr(y_only=True)` and, but for its
    rounding of 8-bit pictures, MATLAB's rgb2ycbcr.
    """
    r, g, b = (rgb.select(-3, c) for c in range(3))
    y = (r * (STUDIO[0] / 255)).add_(g, alpha=STUDIO[1] / 255).add_(b, alpha=STUDIO[2] / 255)
    return y.add_(16 / 255).unsqueeze(-3)


def matched_frames(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the two clips frame by frame as float32 `3 H W` in [0, 1], so that memory stays at one frame.

    `a` and `b` are `F H W 3` RGB clips on one device: uint8 in 0...255 or floating point in [0, 1].
    Raises ValueError if their shapes differ, if they are not RGB clips or if they hold no frame.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape:
        raise ValueError(f"cannot compare clips of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim != 4 or a.shape[-1] != 3 or a.shape[0] == 0:
        raise ValueError(
            f"a metric takes RGB clips shaped F H W 3 with at least one frame, got {tuple(a.shape)}"
        )
    for frame_a, frame_b in zip(a, b, strict=True):
        yield unit(frame_a), unit(frame_b)
