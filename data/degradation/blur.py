"""Blur kernels that move with time, and their application.

Seven kernel families of Real-ESRGAN / RealBasicVSR: Gaussian, generalised Gaussian and plateau, each
isotropic or not, and sinc (ringing). Kernels are float32 `[F, k, k]`, sum to one and are symmetric about
their centre, so correlation and convolution are the same thing.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data.degradation.presets import Blur, Sharpen, choose

SHAPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc")


def mirror_index(size: int, before: int, after: int) -> torch.Tensor:
    """Indices that extend 0..size-1 on both sides by mirroring about the first and last sample, however far.

    Returns int64 `[before + size + after]`.
    """
    i = torch.arange(-before, size + after)
    if size == 1:
        return torch.zeros_like(i)
    i = i.abs() % (2 * (size - 1))
    return torch.where(i < size, i, 2 * (size - 1) - i)


def _mirror(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Mirrors `height` rows and `width` columns around `F C H W`."""
    if height < x.shape[2] and width < x.shape[3]:
        return F.pad(x, (width, width, height, height), mode="reflect")
    # torch refuses a border as wide as the picture, which small second-stage frames do have
    x = x.index_select(2, mirror_index(x.shape[2], height, height))
    return x.index_select(3, mirror_index(x.shape[3], width, width))


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
    """Parameters of one clip's blur (None: this clip is not blurred): shape and size once, the rest
    walked."""
    if rng.uniform() >= config.probability:
        return None
    shape = choose(config.shapes, rng)
    size = int(rng.choice(config.sizes))
    if shape == "sinc":
        omega = config.omega_small if size < 13 else config.omega_large
        return {"shape": shape, "size": size, "omega": omega.draw(frames, rng).tolist()}
    drawn = {"shape": shape, "size": size, "sigma_x": config.sigma.draw(frames, rng).tolist()}
    if shape.endswith("aniso"):
        drawn["sigma_y"] = config.sigma.draw(frames, rng).tolist()
        drawn["rotation"] = config.rotation.draw(frames, rng).tolist()
    if not shape.startswith(("iso", "aniso")):
        beta = config.beta_plateau if shape.startswith("plateau") else config.beta_gaussian
        drawn["beta"] = beta.draw(frames, rng).tolist()
    return drawn


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


def apply(frames: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Blurs every frame with its own kernel, borders mirrored.

    `frames` `F C H W` in [0, 1], `kernel` `F kh kw` (odd sizes). Returns the same shape, clipped to [0, 1]:
    a sinc kernel overshoots.
    """
    f, c, h, w = frames.shape
    kh, kw = kernel.shape[-2:]
    x = _mirror(frames, kh // 2, kw // 2)
    weight = kernel[:, None].expand(f, c, kh, kw).reshape(f * c, 1, kh, kw)
    out = F.conv2d(x.reshape(1, f * c, *x.shape[-2:]), weight, groups=f * c)
    return out.reshape(f, c, h, w).clamp_(0, 1)


def sharpen(frames: torch.Tensor, config: Sharpen) -> torch.Tensor:
    """Unsharp mask: adds `weight` of the detail where it exceeds `threshold`, with a softened mask.

    `frames` `F C H W` in [0, 1], same out, clipped.
    """
    sigma = 0.3 * ((config.kernel - 1) * 0.5 - 1) + 0.8  # OpenCV's sigma for a kernel size
    axis = torch.arange(config.kernel, dtype=torch.float64) - config.kernel // 2
    taps = torch.exp(-0.5 * (axis / sigma) ** 2)
    taps = (taps / taps.sum()).float().expand(len(frames), -1)

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return apply(apply(x, taps[:, None, :]), taps[:, :, None])

    detail = frames - smooth(frames)
    mask = smooth((detail.abs() * 255 > config.threshold).to(frames.dtype))
    sharp = (frames + config.weight * detail).clamp(0, 1)
    return (mask * sharp + (1 - mask) * frames).clamp_(0, 1)
