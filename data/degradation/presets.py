"""What a degradation draws from: ranges, probabilities and the bound of every per-frame walk.

A preset is a plain frozen value. `realbasicvsr` follows the second-order *video* degradation of RealBasicVSR
(Chan et al. 2022; ranges of its published training configuration), which FlashVSR names as its own. Where
that code does something it plainly did not mean, we do what it meant and say so beside the number.
"""

import math
from dataclasses import dataclass

import numpy as np

from flashvsr.base.cli import UserError

PI = math.pi


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


@dataclass(frozen=True)
class Resize:
    directions: tuple[tuple[str, float], ...]  # (up | down | keep, probability)
    scale: Walk
    filters: tuple[str, ...]  # drawn evenly; also used by the last resize to the LR size


@dataclass(frozen=True)
class Noise:
    kinds: tuple[tuple[str, float], ...]  # (gaussian | poisson, probability)
    gray: float  # probability that all three channels get the same noise
    sigma: Walk  # Gaussian, in 8-bit levels
    scale: Walk  # Poisson: noise standard deviation is about 11.3 levels x scale at mid-gray


@dataclass(frozen=True)
class Jpeg:
    quality: Walk


@dataclass(frozen=True)
class Codec:
    """One trip through a video codec."""

    names: tuple[tuple[str, float], ...]  # (PyAV encoder, probability)
    bits: tuple[int, int]  # bits per frame, evenly drawn, at an HR area of 256 x 256; scales with the area


@dataclass(frozen=True)
class Stage:
    blur: Blur
    resize: Resize
    noise: Noise
    jpeg: Jpeg
    codec: Codec


@dataclass(frozen=True)
class Preset:
    """Sharpen, stage 1 (ends in its codec), stage 2, then codec and {last resize, sinc} in random order."""

    sharpen: Sharpen
    first: Stage
    second: Stage
    final_sinc: Blur


_SHAPES = (
    ("iso", 0.405),
    ("aniso", 0.225),
    ("generalized_iso", 0.108),
    ("generalized_aniso", 0.027),
    ("plateau_iso", 0.108),
    ("plateau_aniso", 0.027),
    ("sinc", 0.1),
)
_FILTERS = ("bilinear", "area", "bicubic")


def _blur(probability: float, sigma: float, shapes=_SHAPES, small_omega_everywhere: bool = False) -> Blur:
    small = Walk(PI / 3, PI, PI / 50)
    return Blur(
        probability=probability,
        sizes=(7, 9, 11, 13, 15, 17, 19, 21),
        shapes=shapes,
        sigma=Walk(0.2, sigma, 0.02),
        rotation=Walk(-PI, PI, PI / 10),
        # The published code redraws beta between 1 and its value at every frame; ours walks like the rest.
        beta_gaussian=Walk(0.5, 4.0, 0.05),
        beta_plateau=Walk(1.0, 2.0, 0.1),
        omega_small=small,
        omega_large=small if small_omega_everywhere else Walk(PI / 5, PI, PI / 50),
    )


def _noise(sigma: float, scale: float) -> Noise:
    return Noise(
        kinds=(("gaussian", 0.5), ("poisson", 0.5)),
        gray=0.4,
        sigma=Walk(1.0, sigma, 0.1),
        scale=Walk(0.05, scale, 0.005),
    )


# The published list is libx264, h264, mpeg4 a third each; the first two name the same encoder.
_CODEC = Codec(names=(("libx264", 2 / 3), ("mpeg4", 1 / 3)), bits=(10_000, 100_000))
_JPEG = Jpeg(quality=Walk(30, 95, 3))

REALBASICVSR = Preset(
    sharpen=Sharpen(kernel=51, weight=0.5, threshold=10.0),
    first=Stage(
        blur=_blur(1.0, 3.0),
        resize=Resize((("up", 0.2), ("down", 0.7), ("keep", 0.1)), Walk(0.15, 1.5, 0.015), _FILTERS),
        noise=_noise(30.0, 3.0),
        jpeg=_JPEG,
        codec=_CODEC,
    ),
    second=Stage(
        blur=_blur(0.8, 1.5),
        resize=Resize((("up", 0.3), ("down", 0.4), ("keep", 0.3)), Walk(0.3, 1.2, 0.03), _FILTERS),
        noise=_noise(25.0, 2.5),
        jpeg=_JPEG,
        codec=_CODEC,
    ),
    final_sinc=_blur(0.8, 1.5, shapes=(("sinc", 1.0),), small_omega_everywhere=True),
)

PRESETS = {"realbasicvsr": REALBASICVSR}


def preset(name: str) -> Preset:
    """The preset of that name; raises UserError naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown degradation preset '{name}': choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def choose(options: tuple[tuple[str, float], ...], rng: np.random.Generator) -> str:
    """One name out of `(name, probability)` pairs; the probabilities need not sum to one exactly."""
    weights = np.cumsum([p for _, p in options])
    return options[int(np.searchsorted(weights, rng.uniform(0, weights[-1]), side="right"))][0]
