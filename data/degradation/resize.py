"""Resizing inside the degradation: the filters of OpenCV that the original pipeline draws from.

Bilinear and bicubic here sample without a low-pass (no antialias): their aliasing is part of the degradation.
This is not the resize the model uses (that is flashvsr.base.resize).
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch

from data.degradation import linear
from data.degradation.frames import Frame, planes
from data.degradation.steps import Resize, choose

SMALLEST = 8  # pixels: below it there is nothing left to encode
FILTERS = ("bilinear", "area", "bicubic")


def draw(config: Resize, frames: int, base: tuple[int, int], rng: np.random.Generator) -> dict:
    """Direction and filter once per clip, the scale of `base` (h, w) walked from the drawn side of 1.

    A "keep" clip starts at 1 and walks away from it, as in the original.
    """
    direction = choose(config.directions, rng)
    low, high = {"up": (1.0, config.scale.high), "down": (config.scale.low, 1.0), "keep": (1.0, 1.0)}[
        direction
    ]
    scale = config.scale.draw(frames, rng, start=rng.uniform(low, high))
    return {
        "direction": direction,
        "filter": draw_filter(config.filters, rng),
        "of": list(base),
        "scale": scale.tolist(),
        "clip": config.clip,
    }


def draw_filter(filters: tuple[str, ...], rng: np.random.Generator) -> str:
    return filters[int(rng.integers(len(filters)))]


def even_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The scaled size, rounded down to even numbers (4:2:0 video needs them), never below SMALLEST."""
    return tuple(max(SMALLEST, int(s * scale) // 2 * 2) for s in (height, width))


@lru_cache(maxsize=64)
def band(kind: str, source: int, target: int) -> linear.Band:
    """The map of one axis, as OpenCV's filter of that name.

    "area" averages exact, fractional footprints; bicubic is Keys' cubic with a = -0.75; samples beyond the
    border repeat it.
    """
    if kind == "area":
        return linear.sampling(*_footprints(source, target), source)
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    if kind == "bilinear":
        offsets, law = np.arange(2), lambda d: 1 - d
    elif kind == "bicubic":
        offsets, law = np.arange(-1, 3), _keys
    else:
        raise ValueError(f"unknown resize filter '{kind}': use {', '.join(FILTERS)}")
    index = np.floor(centre).astype(int)[:, None] + offsets
    weights = law(np.abs(centre[:, None] - index))
    return linear.sampling(index.clip(0, source - 1), weights, source)


def _keys(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _footprints(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    ratio = source / target
    begin = np.arange(target) * ratio
    index = np.floor(begin).astype(int)[:, None] + np.arange(int(np.ceil(ratio)) + 1)
    overlap = np.minimum(begin[:, None] + ratio, index + 1) - np.maximum(begin[:, None], index)
    overlap = overlap.clip(min=0) * (index < source)
    return index.clip(0, source - 1), overlap / overlap.sum(1, keepdims=True)


def resized(frame: torch.Tensor, size: tuple[int, int], kind: str) -> torch.Tensor:
    """`C H W` at `size` (h, w); bicubic overshoots."""
    height, width = frame.shape[1:]
    if size == (height, width):
        return frame
    return linear.separable(frame, band(kind, height, size[0]), band(kind, width, size[1]))


def apply(frames: Iterable[Frame], params: dict) -> Iterator[torch.Tensor]:
    """Resizes every frame to the scale that `draw` gave it."""
    for frame, scale in zip(frames, params["scale"], strict=False):
        small = resized(planes(frame), even_size(*params["of"], scale), params["filter"])
        yield small.clamp_(0, 1) if params["clip"] and params["filter"] == "bicubic" else small


def to_size(frames: Iterable[Frame], params: dict) -> Iterator[torch.Tensor]:
    """Resizes every frame to `params["size"]`."""
    for frame in frames:
        small = resized(planes(frame), tuple(params["size"]), params["filter"])
        yield small.clamp_(0, 1) if params["clip"] and params["filter"] == "bicubic" else small
