"""NIQE, the natural image quality evaluator (Mittal, Soundararajan, Bovik 2013): needs no reference.

A frame's luma is normalised by its local mean and deviation; each block of 96x96 pixels is described by the
shape of those values and of the products of neighbours (asymmetric generalised Gaussians), at full and at
half size: 36 numbers. Their mean and covariance over the blocks are compared with those of undistorted
photographs. The lower, the more alike.

`niqe.npz` holds that model, 36 + 36x36 numbers of the authors' release (niqe_release, LIVE, University of
Texas at Austin) as the package basicsr 1.4.2 carries them (Apache-2.0, metrics/niqe_pris_params.npz there).
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.frames import LUMA
from eval.metrics.scoring import Frames, Metric, Values

BLOCK = 96
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # right, below, and the two diagonals
_TOGETHER = {False: 2**18, True: 2**25}  # pixels of blocks described at once, on a CPU and on a GPU


def niqe_of(luma: Tensor) -> Tensor:
    """NIQE of each frame, luma `n H W` in 0...255 -> float64 `n`; nan with under two textured blocks.

    Blocks that do not fit in whole are left out.
    """
    n, height, width = luma.shape
    rows, columns = height // BLOCK, width // BLOCK
    if rows * columns < 2:
        return torch.full((n,), torch.nan, dtype=torch.float64)
    luma = luma[:, : rows * BLOCK, : columns * BLOCK].double()
    halves = (luma, _half(luma))
    features = [
        _described(_blocks(_normalised(x), BLOCK >> i)).unflatten(0, (n, -1)) for i, x in enumerate(halves)
    ]
    return torch.stack([_distance(frame) for frame in torch.cat(features, dim=2)])


def _normalised(x: Tensor) -> Tensor:
    """(x - local mean) / (local deviation + 1), Gaussian window 7 with sigma 7/6, borders repeated."""
    mean, square = _gaussian(x), _gaussian(x * x)
    return (x - mean) / ((square - mean * mean).abs_().sqrt_() + 1)


def _gaussian(x: Tensor) -> Tensor:
    taps = [math.exp(-((i - 3) ** 2) / (2 * (7 / 6) ** 2)) for i in range(7)]
    x = F.pad(x[:, None], (3, 3, 3, 3), mode="replicate")[:, 0]
    for dim in (-2, -1):
        size = x.shape[dim] - 6
        x = sum(x.narrow(dim, i, size) * (tap / sum(taps)) for i, tap in enumerate(taps))
    return x


def _half(x: Tensor) -> Tensor:
    """Half the size as MATLAB's imresize: bicubic (a = -1/2) stretched to 8 taps, borders mirrored."""

    def cubic(t: float) -> float:
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2

    taps = [cubic(abs(i - 3.5) / 2) / 2 for i in range(8)]
    for dim in (-2, -1):
        size = x.shape[dim]
        place = torch.arange(-3, size + 3, device=x.device)
        place = torch.where(place < 0, -1 - place, torch.where(place >= size, 2 * size - 1 - place, place))
        x = x.index_select(dim, place).unfold(dim, 8, 2) @ x.new_tensor(taps)
    return x


def _blocks(x: Tensor, side: int) -> Tensor:
    """`n H W` -> `(n rows columns) side side`."""
    n, height, width = x.shape
    return x.reshape(n, height // side, side, width // side, side).transpose(2, 3).reshape(-1, side, side)


def _described(blocks: Tensor) -> Tensor:
    """18 numbers of each block `k side side` -> `k 18`; nan where a block has no values of one sign."""
    together = max(1, _TOGETHER[blocks.device.type != "cpu"] // blocks[0].numel())
    return torch.cat([_describe(group) for group in blocks.split(together)])


def _describe(blocks: Tensor) -> Tensor:
    shape, left, right = _fit(blocks)
    numbers = [shape, (left + right) / 2]
    for shift in _SHIFTS:
        shape, left, right = _fit(blocks * blocks.roll(shift, dims=(1, 2)))
        mean = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
        numbers += [shape, mean, left, right]
    return torch.stack(numbers, dim=1)


def _fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left and right scale of the asymmetric generalised Gaussian of each `k h w`, by its moments."""
    negative, positive = x < 0, x > 0
    square = x * x
    left = ((square * negative).sum(dim=(1, 2)) / negative.sum(dim=(1, 2))).sqrt()
    right = ((square * positive).sum(dim=(1, 2)) / positive.sum(dim=(1, 2))).sqrt()
    skew = left / right
    ratio = x.abs().mean(dim=(1, 2)) ** 2 / square.mean(dim=(1, 2))
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes, ratios = _table(x.device)
    # A block without values of one sign has no ratio; the authors' search then ends at the first shape.
    after = torch.searchsorted(ratios, torch.where(ratio.isnan(), 0, ratio)).clamp(1, len(ratios) - 1)
    nearer = after - (ratio - ratios[after - 1] <= ratios[after] - ratio).long()
    shape = shapes[nearer]
    scale = (torch.lgamma(1 / shape) - torch.lgamma(3 / shape)).mul(0.5).exp()
    return shape, left * scale, right * scale


@lru_cache(maxsize=4)
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The shapes .2, .201, ... 10 tried by the authors, and Γ(2/s)² / (Γ(1/s) Γ(3/s)), which grows with s."""
    s = torch.arange(200, 10001, dtype=torch.float64) / 1000
    ratio = (2 * torch.lgamma(2 / s) - torch.lgamma(1 / s) - torch.lgamma(3 / s)).exp()
    return s.to(device), ratio.to(device)


@lru_cache(maxsize=1)
def _photographs() -> tuple[Tensor, Tensor]:
    with np.load(Path(__file__).with_name("niqe.npz")) as model:
        return torch.from_numpy(model["mean"]), torch.from_numpy(model["covariance"])


def _distance(features: Tensor) -> Tensor:
    """Equation 10 of the paper between the blocks of one frame, `k 36`, and the photographs."""
    features = features.cpu()
    whole = features[~features.isnan().any(dim=1)]
    if len(whole) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    mean, covariance = _photographs()
    difference = features.nanmean(dim=0) - mean
    return (difference @ torch.linalg.pinv((covariance + whole.T.cov()) / 2) @ difference).sqrt()


def _measure(frames: Frames) -> Tensor:
    weights = frames.sr.rgb.new_tensor(LUMA)[:, None, None]
    return niqe_of((frames.sr.rgb * weights).sum(dim=1).mul_(255).round_())


def _gather(rows: Tensor) -> Values:
    """The mean over the frames where NIQE is defined, saying how many are not."""
    defined = rows[~rows.isnan()]
    if len(defined) == 0:
        return Values(rows, None, reason=f"no frame has two blocks of {BLOCK}x{BLOCK} pixels with texture")
    left_out = len(rows) - len(defined)
    reason = f"{left_out} of {len(rows)} frames without texture are left out" if left_out else ""
    return Values(rows, defined.mean().item(), reason=reason)


NIQE = Metric(
    key="niqe",
    title="NIQE",
    higher=False,
    digits=3,
    description="NIQE v1: as pyiqa's niqe, full-range BT.601 luma rounded to 8 bits, blocks of 96x96, "
    "mean over frames",
    measure=_measure,
    gather=_gather,
    needs_gt=False,
)
