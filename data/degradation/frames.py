"""The two forms in which a frame travels between operators, and the ways from one to the other.

Filters and noise work on planes, float32 `3 H W` with 0 black and 1 white; JPEG and codecs take bytes, uint8
`H W 3` RGB. Only the way to bytes rounds.
"""

from typing import TypeAlias

import numpy as np
import torch

Frame: TypeAlias = torch.Tensor | np.ndarray  # planes or bytes


def planes(frame: Frame) -> torch.Tensor:
    """The frame as float32 `3 H W`."""
    if isinstance(frame, torch.Tensor):
        return frame
    levels = torch.from_numpy(np.require(frame, requirements="W"))  # Pillow's arrays are read-only
    return levels.permute(2, 0, 1).contiguous().float().mul_(1 / 255)


def bytes_of(frame: Frame) -> np.ndarray:
    """The frame as uint8 `H W 3`: clipped, rounded to the nearest level."""
    if isinstance(frame, np.ndarray):
        return frame
    return _interleaved((frame * 255).round_().clamp_(0, 255))


def wrapped_bytes(frame: Frame) -> np.ndarray:
    """The frame as uint8 `H W 3` as a plain cast makes it: cut off, not rounded, and modulo 256."""
    if isinstance(frame, np.ndarray):
        return frame
    return _interleaved((frame * 255).to(torch.int32).bitwise_and_(255))


def _interleaved(levels: torch.Tensor) -> np.ndarray:
    from PIL import Image

    # Pillow interleaves planes three times as fast as torch and NumPy.
    return np.asarray(Image.merge("RGB", [Image.fromarray(p) for p in levels.to(torch.uint8).numpy()]))
