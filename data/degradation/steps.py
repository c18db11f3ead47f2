"""What a degradation is made of: steps with ranges, probabilities and the bound of every per-frame walk.

A preset is a tuple of these frozen values (presets.py); the operators that read them are in the files of the
same names (blur, resize, noise, camera, compression). Sizes are pixels, angles radians.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Walk:
    """A range and how far one value in it may move from one frame to the next."""

    low: float
    high: float
    step: float

    def draw(self, frames: int, rng: np.random.Generator, start: float | None = None) -> np.ndarray:
        """One value per frame, float64 `[frames]`.

        Frame 0 is `start` (drawn from U(low, high) when None); every next frame adds U(-step, step) and is
        clipped to the range. Always draws the same count of random numbers for the same arguments.
        """
        first = rng.uniform(self.low, self.high) if start is None else start
        moves = rng.uniform(-self.step, self.step, size=max(frames - 1, 0))
        values = np.empty(frames)
        values[0] = first
        for i, move in enumerate(moves):
            values[i + 1] = min(max(values[i] + move, self.low), self.high)
        return values


@dataclass(frozen=True)
class Sharpen:
    """Unsharp mask on the frames that are degraded (never on the training target)."""

    kernel: int  # taps of the Gaussian; its sigma follows from them as in OpenCV
    weight: float
    threshold: float  # in 8-bit levels: differences below it are left alone


@dataclass(frozen=True)
class Blur:
    probability: float
    sizes: tuple[int, ...]
    shapes: tuple[tuple[str, float], ...]  # (kernel shape, probability), see blur.SHAPES
    sigma: Walk
    rotation: Walk
    beta_gaussian: Walk
    beta_plateau: Walk
    omega_small: Walk  # cut-off of a sinc kernel below 13 taps, radians per pixel
    omega_large: Walk  # from 13 taps on
    beta: str = "walk"  # or "halves": starts below or above 1 evenly; or "redraw": see docs/degradation.md
    clip: bool = True  # to [0, 1] afterwards


@dataclass(frozen=True)
class Resize:
    directions: tuple[tuple[str, float], ...]  # (up | down | keep, probability)
    scale: Walk
    filters: tuple[str, ...]  # drawn evenly
    of: str = "frame"  # or "lr": the scale is relative to the LR size
    clip: bool = True


@dataclass(frozen=True)
class ToLR:
    """The last resize, to exactly the LR size."""

    filters: tuple[str, ...]
    clip: bool = True


@dataclass(frozen=True)
class Noise:
    kinds: tuple[tuple[str, float], ...]  # (gaussian | poisson, probability)
    gray: float  # probability that all three channels get the same noise
    sigma: Walk  # Gaussian, in 8-bit levels
    scale: Walk  # Poisson: noise standard deviation is about 11.3 levels x scale at mid-gray
    probability: float = 1.0
    clip: bool = True


@dataclass(frozen=True)
class Grain:
    """Film grain: Gaussian noise of some size, strongest in the mid-tones, new in every frame."""

    probability: float
    strength: Walk  # standard deviation at mid-gray, in 8-bit levels
    size: Walk  # sigma of the grain's own blur
    color: float  # probability that the channels get grain of their own


@dataclass(frozen=True)
class Chroma:
    """Colour differences at a lower resolution, put back by a poor filter."""

    probability: float
    forms: tuple[tuple[str, float], ...]  # (4:2:0 | 4:2:2 | 4:1:1, probability)
    filters: tuple[str, ...]  # nearest | bilinear, drawn evenly


@dataclass(frozen=True)
class Jpeg:
    quality: Walk
    whole_steps: bool = False  # the walk itself goes over whole numbers
    swapped: bool = False  # red and blue change places for the encoder


@dataclass(frozen=True)
class Codec:
    """One trip through a video codec, at a mean count of bits per frame."""

    names: tuple[tuple[str, float], ...]  # (PyAV encoder, probability)
    bits: tuple[int, int]  # bits per frame at an HR area of 256 x 256
    probability: float = 1.0
    scaled: bool = True  # bits grow with the HR area
    logarithmic: bool = False  # bits are drawn evenly in their logarithm
    fps: int = 1  # the stream's clock; the rate is bits x fps
    speed: str = "medium"  # preset of x264 and x265
    wrap: bool = False  # values are cut to 8 bits without clipping


@dataclass(frozen=True)
class Shuffled:
    """Two groups of steps, in either order with even chances."""

    one: tuple
    other: tuple


Preset = tuple  # of the steps above, in the order in which they act


def choose(options: tuple[tuple[str, float], ...], rng: np.random.Generator) -> str:
    """One name out of `(name, probability)` pairs; the probabilities need not sum to one exactly."""
    weights = np.cumsum([p for _, p in options])
    return options[int(np.searchsorted(weights, rng.uniform(0, weights[-1]), side="right"))][0]
