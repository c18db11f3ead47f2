"""Resizing inside the degradation: the filters of OpenCV that the original pipeline draws from.

Bilinear and bicubic here sample without a low-pass (no antialias): their aliasing is part of the degradation.
This is not the resize the model uses (that is flashvsr.base.resize).
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from data.degradation.presets import Resize, choose

SMALLEST = 8  # pixels: below it there is nothing left to encode


def draw(config: Resize, frames: int, rng: np.random.Generator) -> dict:
    """Direction and filter once per clip, the scale walked from a value on the drawn side of 1.

    A "keep" clip starts at 1 and walks away from it, as in the original.
    """
    direction = choose(config.directions, rng)
    low, high = {"up": (1.0, config.scale.high), "down": (config.scale.low, 1.0), "keep": (1.0, 1.0)}[
        direction
    ]
    scale = config.scale.draw(frames, rng, start=rng.uniform(low, high))
    return {"direction": direction, "filter": draw_filter(config, rng), "scale": scale.tolist()}


def draw_filter(config: Resize, rng: np.random.Generator) -> str:
    return config.filters[int(rng.integers(len(config.filters)))]


def even_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The scaled size, rounded down to even numbers (4:2:0 video needs them), never below SMALLEST."""
    return tuple(max(SMALLEST, int(s * scale) // 2 * 2) for s in (height, width))


@lru_cache(maxsize=256)
def area_weights(source: int, target: int) -> torch.Tensor:
    """Box filter over exact, fractional footprints for shrinking: float32 `[target, source]`, rows sum to
    1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (source / target)
    left = torch.arange(source, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    overlap = overlap.clamp_min(0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def apply(frames: torch.Tensor, size: tuple[int, int], kind: str) -> torch.Tensor:
    """Resizes `F C H W` in [0, 1] to `size` (h, w); clipped to [0, 1] (bicubic overshoots).

    "area" averages exact footprints along an axis that shrinks and is bilinear along one that grows.
    """
    h, w = frames.shape[-2:]
    if size == (h, w):
        return frames
    if kind in ("bilinear", "bicubic"):
        return F.interpolate(frames, size=size, mode=kind, align_corners=False).clamp_(0, 1)
    if kind != "area":
        raise ValueError(f"unknown resize filter '{kind}': use bilinear, area or bicubic")
    if size[0] < h:
        frames = area_weights(h, size[0]) @ frames
    if size[1] < w:
        frames = frames @ area_weights(w, size[1]).T
    if frames.shape[-2:] != size:
        frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    return frames.clamp(0, 1)
