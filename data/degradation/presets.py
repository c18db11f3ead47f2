"""The presets: what is done to a clip, in which order, and how much.

A preset is a plain tuple of steps. `realbasicvsr` follows the second-order *video* degradation of
RealBasicVSR (Chan et al. 2022; ranges of its published training configuration), which FlashVSR names as its
own. Where that code does something it plainly did not mean, we do what it meant; `realbasicvsr-legacy` does
what it does (docs/degradation.md lists both). Sizes, probabilities and ranges stand here and nowhere else.
"""

import math
from dataclasses import replace

from data.degradation.steps import (
    Blur,
    Chroma,
    Codec,
    Grain,
    Jpeg,
    Noise,
    Preset,
    Resize,
    Sharpen,
    Shuffled,
    ToLR,
    Walk,
)
from flashvsr.base.cli import UserError

PI = math.pi

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
_SHARPEN = Sharpen(kernel=51, weight=0.5, threshold=10.0)


def _blur(probability: float, sigma: float) -> Blur:
    return Blur(
        probability=probability,
        sizes=(7, 9, 11, 13, 15, 17, 19, 21),
        shapes=_SHAPES,
        sigma=Walk(0.2, sigma, 0.02),
        rotation=Walk(-PI, PI, PI / 10),
        beta_gaussian=Walk(0.5, 4.0, 0.05),
        beta_plateau=Walk(1.0, 2.0, 0.1),
        omega_small=Walk(PI / 3, PI, PI / 50),
        omega_large=Walk(PI / 5, PI, PI / 50),
    )


_SINC = replace(_blur(0.8, 1.5), shapes=(("sinc", 1.0),), omega_large=Walk(PI / 3, PI, PI / 50))


def _resize(up: float, down: float, keep: float, scale: Walk, of: str = "frame") -> Resize:
    return Resize((("up", up), ("down", down), ("keep", keep)), scale, _FILTERS, of)


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

REALBASICVSR: Preset = (
    _SHARPEN,
    _blur(1.0, 3.0),
    _resize(0.2, 0.7, 0.1, Walk(0.15, 1.5, 0.015)),
    _noise(30.0, 3.0),
    _JPEG,
    _CODEC,
    _blur(0.8, 1.5),
    _resize(0.3, 0.4, 0.3, Walk(0.3, 1.2, 0.03)),
    _noise(25.0, 2.5),
    _JPEG,
    Shuffled((_CODEC,), (ToLR(_FILTERS), _SINC)),
)


def changed(preset: Preset, change) -> Preset:
    """The preset with every step replaced by `change(step)`, those inside groups too."""
    return tuple(
        Shuffled(changed(step.one, change), changed(step.other, change))
        if isinstance(step, Shuffled)
        else change(step)
        for step in preset
    )


def _legacy(step):
    if isinstance(step, Blur):
        return replace(step, beta="redraw", clip=False)
    if isinstance(step, Resize | ToLR | Noise):
        return replace(step, clip=False)
    if isinstance(step, Jpeg):
        return replace(step, whole_steps=True, swapped=True)
    if isinstance(step, Codec):
        return replace(step, scaled=False, wrap=True)
    return step


def _still(walk: Walk) -> Walk:
    return replace(walk, step=0.0)


def _dove(step):
    """Parameters hold for a clip, except JPEG's quality. DOVE runs the Poisson law on values of 0 to 255,
    which is 1/sqrt(255) of its strength."""
    if isinstance(step, Blur):
        names = ("sigma", "rotation", "beta_gaussian", "beta_plateau", "omega_small", "omega_large")
        return replace(step, **{name: _still(getattr(step, name)) for name in names})
    if isinstance(step, Resize):
        return replace(step, scale=_still(step.scale))
    if isinstance(step, Noise):
        weak = Walk(step.scale.low / math.sqrt(255), step.scale.high / math.sqrt(255), 0.0)
        return replace(step, sigma=_still(step.sigma), scale=weak)
    return step


# Real-ESRGAN's generator of pairs (Wang et al. 2021): no codec; the second resize is relative to the LR size;
# exponents start below 1 as often as above. It knows single images: the walks are RealBasicVSR's.
REALESRGAN: Preset = (
    _SHARPEN,
    replace(_blur(1.0, 3.0), beta="halves"),
    _resize(0.2, 0.7, 0.1, Walk(0.15, 1.5, 0.015)),
    _noise(30.0, 3.0),
    _JPEG,
    replace(_blur(0.8, 1.5), beta="halves"),
    _resize(0.3, 0.4, 0.3, Walk(0.3, 1.2, 0.03), of="lr"),
    _noise(25.0, 2.5),
    Shuffled((ToLR(_FILTERS), _SINC), (_JPEG,)),
)

_UPLOAD = Codec(
    names=(("libx264", 0.6), ("libx265", 0.4)),
    bits=(2_500, 40_000),  # 0.04 to 0.6 bits per HR pixel: poor streaming to good cameras
    logarithmic=True,
    fps=25,
    speed="veryfast",  # about what hardware encoders and upload servers spend
)

# Ours: a lens, a sensor or film, then two or three encodings with a resize between them. Mild where the
# others are harsh, because codecs do most of the damage to today's footage.
MODERN: Preset = (
    replace(_blur(0.8, 2.0), sizes=(7, 9, 11, 13)),
    _resize(0.0, 0.7, 0.3, Walk(0.3, 1.0, 0.005)),
    Grain(0.35, strength=Walk(2.0, 14.0, 0.1), size=Walk(0.4, 1.4, 0.01), color=0.3),
    replace(_noise(10.0, 1.0), kinds=(("gaussian", 0.3), ("poisson", 0.7)), gray=0.2, probability=0.5),
    _UPLOAD,
    Chroma(0.3, forms=(("4:2:0", 0.6), ("4:2:2", 0.2), ("4:1:1", 0.2)), filters=("nearest", "bilinear")),
    _resize(0.2, 0.4, 0.4, Walk(0.5, 1.2, 0.005)),
    _UPLOAD,
    Shuffled((replace(_UPLOAD, probability=0.5),), (ToLR(_FILTERS), replace(_SINC, probability=0.3))),
)

PRESETS: dict[str, Preset] = {
    "realbasicvsr": REALBASICVSR,
    "realbasicvsr-legacy": changed(REALBASICVSR, _legacy),
    "realesrgan": REALESRGAN,
    "dove": changed(REALBASICVSR[1:], _dove),  # without the sharpening
    "modern": MODERN,
}


def preset(name: str) -> Preset:
    """The preset of that name; raises UserError naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown degradation preset '{name}': choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
