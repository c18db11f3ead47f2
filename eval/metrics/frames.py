"""What every metric does first: check that two clips match and bring them to one layout and range."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


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
        yield _unit(frame_a), _unit(frame_b)


def _unit(frame: Tensor) -> Tensor:
    frame = frame.detach().permute(2, 0, 1)
    if frame.dtype == torch.uint8:
        return frame.float() / 255
    if frame.is_floating_point():
        return frame.float()
    raise ValueError(f"a metric takes uint8 or floating-point frames, got {frame.dtype}")
