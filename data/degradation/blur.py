"""Blur kernels that move with time, and their application.

Seven kernel families of Real-ESRGAN / RealBasicVSR: Gaussian, generalised Gaussian and plateau, each
isotropic or not, and sinc (ringing). Kernels are float32 `[F, k, k]`, sum to one and are symmetric about
their centre, so correlation and convolution are the same thing.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from data.degradation import linear
from data.degradation.frames import Frame, planes
from data.degradation.steps import Blur, Sharpen, choose

SHAPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc")


def gaussian_kernels(shape: str, size: int, sigma_x, sigma_y, rotation, beta) -> torch.Tensor:
    """Gaussian families, one kernel per frame.

    With d = xᵀ Σ⁻¹ x: plain exp(-d/2), generalised exp(-d^β / 2), plateau 1 / (1 + d^β). `sigma_x, sigma_y`
    pixels, `rotation` radians, `beta` exponent: arrays `[F]` (isotropic shapes read sigma_x alone). Returns
    `[F, size, size]`.
    """
    sx = torch.as_tensor(sigma_x, dtype=torch.float64)[:, None, None]
    isotropic = shape.endswith("iso") and not shape.endswith("aniso")
    sy = sx if isotropic else torch.as_tensor(sigma_y, dtype=torch.float64)[:, None, None]
    turn = 0 * sx if isotropic else torch.as_tensor(rotation, dtype=torch.float64)[:, None, None]
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = (x * turn.cos() + y * turn.sin()) / sx
    across = (y * turn.cos() - x * turn.sin()) / sy
    d = along**2 + across**2
    if shape.startswith("plateau"):
        kernel = 1 / (1 + d ** torch.as_tensor(beta, dtype=torch.float64)[:, None, None])
    elif shape.startswith("generalized"):
        kernel = torch.exp(-0.5 * d ** torch.as_tensor(beta, dtype=torch.float64)[:, None, None])
    else:
        kernel = torch.exp(-0.5 * d)
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    return kernel.where(kernel > 1e-12, 0).float()  # denormal taps make the convolution several times slower


def sinc_kernels(size: int, omega) -> torch.Tensor:
    """Circular low-pass ω J1(ωr) / (2πr) with cut-off `omega` `[F]` radians per pixel; `[F, size, size]`."""
    omega = torch.as_tensor(omega, dtype=torch.float64)[:, None, None]
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    r = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    kernel = omega * torch.special.bessel_j1(omega * r) / (2 * np.pi * r.clamp_min(1e-12))
    centre = (omega**2 / (4 * np.pi)).expand_as(kernel)  # the limit at r = 0
    kernel = torch.where(r == 0, centre, kernel)
    return (kernel / kernel.sum((-2, -1), keepdim=True)).float()


def draw(config: Blur, frames: int, rng: np.random.Generator) -> dict | None:
    """Parameters of one clip's blur (None: not blurred): shape and size once, the rest walked."""
    if rng.uniform() >= config.probability:
        return None
    shape = choose(config.shapes, rng)
    size = int(rng.choice(config.sizes))
    if shape == "sinc":
        omega = config.omega_small if size < 13 else config.omega_large
        return {
            "shape": shape,
            "size": size,
            "omega": omega.draw(frames, rng).tolist(),
            "clip": config.clip,
        }
    drawn = {"shape": shape, "size": size, "sigma_x": config.sigma.draw(frames, rng).tolist()}
    if shape.endswith("aniso"):
        drawn["sigma_y"] = config.sigma.draw(frames, rng).tolist()
        drawn["rotation"] = config.rotation.draw(frames, rng).tolist()
    if not shape.startswith(("iso", "aniso")):
        drawn["beta"] = draw_beta(config, shape, frames, rng)
    return drawn | {"clip": config.clip}


def draw_beta(config: Blur, shape: str, frames: int, rng: np.random.Generator) -> list[float]:
    """Exponents of one clip by `config.beta`: "walk" starts anywhere in the range; "halves" starts below 1 or
    above 1 with even chances (Real-ESRGAN); "redraw" walks, but uses a fresh value between 1 and where the
    walk is in every frame (what RealBasicVSR's code does)."""
    walk = config.beta_plateau if shape.startswith("plateau") else config.beta_gaussian
    if config.beta == "halves":
        low, high = (walk.low, 1.0) if rng.uniform() < 0.5 else (1.0, walk.high)
        return walk.draw(frames, rng, start=rng.uniform(low, high)).tolist()
    beta = walk.draw(frames, rng)
    if config.beta == "redraw":
        beta = 1 + rng.uniform(size=frames) * (beta - 1)
    return beta.tolist()


def kernels(params: dict) -> torch.Tensor:
    """The kernels `[F, k, k]` that `draw`'s parameters describe."""
    if params["shape"] == "sinc":
        return sinc_kernels(params["size"], params["omega"])
    sigma = params["sigma_x"]
    return gaussian_kernels(
        params["shape"],
        params["size"],
        sigma,
        params.get("sigma_y", sigma),
        params.get("rotation", [0.0] * len(sigma)),
        params.get("beta", [1.0] * len(sigma)),
    )


@lru_cache(maxsize=256)
def _fast_length(least: int) -> int:
    """The smallest length of a fast Fourier transform: 8 times a product of 2, 3 and 5, at least `least`."""
    length = -(-least // 8)
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return 8 * length
        length += 1


def convolve(frame: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Blurs `C H W` with one kernel `k k` (odd, symmetric about its centre), borders mirrored.

    By Fourier transform: its time does not depend on the kernel's size, and no kernel here has so few taps
    that a convolution would be faster.
    """
    height, width = frame.shape[1:]
    size = len(kernel)
    reach = size // 2
    if reach < min(height, width):
        wide = F.pad(frame, (reach,) * 4, mode="reflect")
    else:  # torch refuses a border as wide as the picture, which small second-stage frames do have
        wide = frame.index_select(1, linear.mirror_index(height, reach, reach))
        wide = wide.index_select(2, linear.mirror_index(width, reach, reach))
    shape = tuple(_fast_length(side) for side in wide.shape[1:])
    spectrum = torch.fft.rfft2(wide, s=shape).mul_(torch.fft.rfft2(kernel, s=shape))
    # Only the first size - 1 outputs of every line are touched by what wraps around.
    blurred = torch.fft.irfft2(spectrum, s=shape)
    return blurred[:, size - 1 : size - 1 + height, size - 1 : size - 1 + width]


def convolve_separable(frame: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Blurs `C H W` with the product of `taps` (odd count, symmetric) along rows and columns."""
    return linear.separable(frame, *(linear.filtering(taps, side) for side in frame.shape[1:]))


def apply(frames: Iterable[Frame], params: dict) -> Iterator[torch.Tensor]:
    """Blurs every frame with the kernel that `draw` gave it."""
    overshoots = params["shape"] == "sinc" and params["clip"]
    for frame, kernel in zip(frames, kernels(params), strict=False):
        if params["shape"] == "iso":  # the only family that is a product
            yield convolve_separable(planes(frame), kernel.sum(0))
        else:
            blurred = convolve(planes(frame), kernel)
            yield blurred.clamp_(0, 1) if overshoots else blurred


def draw_sharpen(config: Sharpen) -> dict:
    return {"kernel": config.kernel, "weight": config.weight, "threshold": config.threshold}


@lru_cache(maxsize=4)
def _smoothing(kernel: int, size: int) -> linear.Band:
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8  # OpenCV's sigma for a kernel size
    axis = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    taps = torch.exp(-0.5 * (axis / sigma) ** 2)
    return linear.filtering((taps / taps.sum()).float(), size)


def sharpen(frames: Iterable[Frame], params: dict) -> Iterator[torch.Tensor]:
    """Unsharp mask: adds `weight` of the detail where it exceeds `threshold`, with a softened mask."""
    for frame in frames:
        x = planes(frame)
        smoothing = tuple(_smoothing(params["kernel"], side) for side in x.shape[1:])
        detail = linear.separable(x, *smoothing).sub_(x).neg_()
        mask = linear.separable((detail.abs() > params["threshold"] / 255).float(), *smoothing)
        sharp = torch.add(x, detail, alpha=params["weight"], out=detail).clamp_(0, 1)
        yield torch.lerp(x, sharp, mask)
