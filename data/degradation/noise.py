"""Gaussian and Poisson noise, in the [0, 1] law of the original code (RealBasicVSR, Real-ESRGAN).

Kind and gray flag hold for a clip, the strength walks, the noise itself is new in every frame. Samples come
from tables of quantiles by random integers: every quantile is as likely as its formula says, at a tenth of
the time of a general Poisson generator. Each frame has its own generator, so frames can be made in any order.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch

from data.degradation.frames import Frame, planes
from data.degradation.steps import Noise, choose

GRAY = (0.299, 0.587, 0.114)  # BT.601 luma
POISSON_QUANTILES = 4096  # 256 such rows are 4 MB; variance is exact to 0.3 %


def draw(config: Noise, frames: int, rng: np.random.Generator) -> dict | None:
    """Parameters of one clip's noise; None when it gets none."""
    if config.probability < 1 and rng.uniform() >= config.probability:
        return None
    kind = choose(config.kinds, rng)
    gray = bool(rng.uniform() < config.gray)
    strength = (config.sigma if kind == "gaussian" else config.scale).draw(frames, rng)
    return {"kind": kind, "gray": gray, "strength": strength.tolist(), "clip": config.clip}


def integers(count: int, *seed: int) -> torch.Tensor:
    """`count` even draws of 0..65535 (int32), which depend on `seed` alone."""
    bits = np.random.SFC64(np.random.SeedSequence(seed)).random_raw((count + 3) // 4)
    return torch.from_numpy(bits.astype("<u8", copy=False).view("<u2")[:count].astype(np.int32))


@lru_cache(maxsize=1)
def normal_table() -> torch.Tensor:
    """65536 evenly likely values of the standard normal distribution, with variance one."""
    z = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    return (z / z.square().mean().sqrt()).float()


@lru_cache(maxsize=9)
def poisson_table(photons: int) -> torch.Tensor:
    """Noise k / photons - clean of evenly likely photon counts k, float32 `[256 * POISSON_QUANTILES]`; the
    row of level l belongs to the mean photons * l / 255."""
    mean = np.arange(256)[:, None] * photons / 255
    counts = np.arange(int(photons + 8 * photons**0.5 + 16))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])
    with np.errstate(divide="ignore"):
        log = np.where(mean > 0, counts * np.log(mean.clip(min=1e-300)) - mean - log_factorial, -np.inf)
    log[0, 0] = 0.0  # without light there is no photon
    cumulative = np.exp(log).cumsum(1)
    at = (np.arange(POISSON_QUANTILES) + 0.5) / POISSON_QUANTILES
    k = np.stack([np.searchsorted(row, at) for row in cumulative])
    return torch.from_numpy((k / photons - mean / photons).astype(np.float32)).flatten()


def normal(shape: tuple[int, ...], *seed: int) -> torch.Tensor:
    """Standard normal noise, float32 of that shape."""
    return normal_table().index_select(0, integers(int(np.prod(shape)), *seed)).view(shape)


def gaussian(frame: torch.Tensor, sigma: float, gray: bool, *seed: int) -> torch.Tensor:
    """`frame` `C H W` plus normal noise of standard deviation `sigma` (8-bit levels)."""
    shape = (1, *frame.shape[1:]) if gray else tuple(frame.shape)
    return torch.add(frame, normal(shape, *seed), alpha=sigma / 255)


def photons_at_white(levels: torch.Tensor) -> int:
    """The count of distinct 8-bit levels, rounded up to a power of two (256 for natural pictures)."""
    flat = levels.flatten()
    for part in (flat[::61], flat):  # a part of the picture nearly always has them
        distinct = int(np.count_nonzero(np.bincount(part.numpy(), minlength=256)))
        if distinct > 128:
            return 256
    return 2 ** (distinct - 1).bit_length()


def poisson(frame: torch.Tensor, scale: float, gray: bool, *seed: int) -> torch.Tensor:
    """`frame` `C H W` in [0, 1] plus `scale` times photon noise.

    With as many photons at white as `photons_at_white` tells, noise has a standard deviation of sqrt(value /
    photons), i.e. 11.3 levels x scale at 0.5.
    """
    source = frame
    if gray:
        source = GRAY[0] * frame[:1] + GRAY[1] * frame[1:2] + GRAY[2] * frame[2:]
    levels = (source * 255).round_().clamp_(0, 255).to(torch.int32)
    table = poisson_table(photons_at_white(levels))
    quantile = integers(levels.numel(), *seed).bitwise_right_shift_(4)
    index = levels.flatten().mul_(POISSON_QUANTILES).add_(quantile)
    return torch.add(frame, table.index_select(0, index).view(levels.shape), alpha=scale)


def apply(frames: Iterable[Frame], params: dict, seed: int, number: int) -> Iterator[torch.Tensor]:
    """Adds the noise of step `number` of a clip whose samples follow from `seed`."""
    add = gaussian if params["kind"] == "gaussian" else poisson
    for i, (frame, strength) in enumerate(zip(frames, params["strength"], strict=False)):
        noisy = add(planes(frame), strength, params["gray"], seed, number, i)
        yield noisy.clamp_(0, 1) if params["clip"] else noisy
