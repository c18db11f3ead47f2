"""Interpolation: what every super-resolution method has to beat."""

import numpy as np
import torch
from PIL import Image

from flashvsr.base.resize import bicubic_8bit


class Bicubic:
    """Pillow's 8-bit bicubic, frame by frame, the very one that feeds our models."""

    delay_frames = 0

    def __init__(self, scale: float = 4):
        self.scale = scale

    def push(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 `F H W 3` to uint8 `F scale·H scale·W 3`: every frame comes back at once."""
        x = torch.as_tensor(frames).permute(0, 3, 1, 2)
        size = (round(self.scale * x.shape[2]), round(self.scale * x.shape[3]))
        return bicubic_8bit(x, size).permute(0, 2, 3, 1)

    def flush(self) -> torch.Tensor:
        """Nothing is held back: uint8 `0 0 0 3`."""
        return torch.empty(0, 0, 0, 3, dtype=torch.uint8)


class Lanczos:
    """Pillow's own 8-bit Lanczos (three lobes), frame by frame, on the CPU."""

    delay_frames = 0

    def __init__(self, scale: float = 4):
        self.scale = scale

    def push(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 `F H W 3` to uint8 `F scale·H scale·W 3`: every frame comes back at once."""
        pixels = torch.as_tensor(frames).cpu().numpy()
        count, height, width, _ = pixels.shape
        height, width = round(self.scale * height), round(self.scale * width)
        out = np.empty((count, height, width, 3), np.uint8)
        for i, frame in enumerate(pixels):
            out[i] = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(out)

    def flush(self) -> torch.Tensor:
        """Nothing is held back: uint8 `0 0 0 3`."""
        return torch.empty(0, 0, 0, 3, dtype=torch.uint8)
