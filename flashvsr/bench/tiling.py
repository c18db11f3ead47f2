"""What cutting into tiles costs: the same clip untiled and in tiles; how far apart, time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr.base import measure
from flashvsr.base.draws import generator
from flashvsr.bench.report import Report, Row, begin
from flashvsr.streaming.upscaler import StreamingUpscaler
from flashvsr.weights.folder import FlashVSR

# LR size, tiles and overlap in LR pixels: the first as published for the release
DEFAULTS = {"wan1.3b": ((192, 352), (192, 160, 128), 24), "small": ((64, 96), (48, 32), 8),
            "tiny": ((48, 80), (32, 16), 8)}  # fmt: skip


def moving_picture(frames: int, height: int, width: int) -> np.ndarray:
    """A picture of many scales that moves two pixels a frame to the right, uint8 `F H W 3`."""
    total = torch.zeros(3, height, width + 2 * frames)
    for level in range(5):
        cells = 2**level + 2
        noise = torch.rand(1, 3, cells, cells, generator=generator(level, "bench.tiling"))
        total += F.interpolate(noise, total.shape[1:], mode="bicubic", antialias=True)[0] / (level + 1)
    total = (total - total.amin()) / (total.amax() - total.amin())
    pixels = (255 * total).round().byte().permute(1, 2, 0).numpy()
    return np.stack([pixels[:, 2 * i : 2 * i + width] for i in range(frames)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames of the PSNR of uint8 RGB frames, in dB; infinite where two frames are equal."""
    mse = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return float((10 * np.log10(255**2 / mse)).mean())


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of uint8 RGB frames: 11x11 Gaussian of 1.5, as `eval.metrics`."""
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def low(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line[None, None, :, None]), line[None, None, None, :])

    values = []
    for one, two in zip(a, b, strict=True):
        x, y = (torch.from_numpy(f).permute(2, 0, 1)[:, None].double() / 255 for f in (one, two))
        mx, my = low(x), low(y)
        energy, product = low(x * x) + low(y * y), low(x * y)
        top = (2 * mx * my + 1e-4) * (2 * (product - mx * my) + 9e-4)
        below = (mx**2 + my**2 + 1e-4) * (energy - mx**2 - my**2 + 9e-4)
        values.append((top / below).mean().item())
    return statistics.mean(values)


def bench_tiling(
    model: FlashVSR,
    frames: np.ndarray,
    tiles: Sequence[int],
    *,
    overlap: int,
    repeats: int = 1,
    facts: dict[str, Any] | None = None,
    **settings: Any,
) -> Report:
    """Upscales `frames` (uint8 `F h w 3`) untiled and in tiles of so many LR pixels.

    Every row's note and `extra["tilings"]` have, against the untiled frames, PSNR and SSIM; the tiles, the
    pixels computed per pixel of the picture, and the time as a multiple.
    """
    weight = model.dit.patch_embedding.weight
    size = "x".join(map(str, frames.shape[1:3]))
    report = begin("tiling", weight.device, weight.dtype, input=size, frames=len(frames), **(facts or {}))
    report.facts["overlap"] = overlap
    report.extra["tilings"] = []
    whole = None
    for tile in (None, *tiles):
        out, row, found = _one(model, frames, tile, overlap, repeats, settings)
        if whole is None:
            whole, first = out, row.seconds
        found |= {"times": row.seconds / first, "psnr": psnr(whole, out), "ssim": ssim(whole, out)}
        if tile is not None:
            note = (
                f"{found['tiles']} tiles, {found['redundancy']:.2f}x the pixels, "
                f"{found['times']:.2f}x the time, PSNR {found['psnr']:.2f} dB, "
                f"SSIM {found['ssim']:.4f} to untiled"
            )
            row = Row(row.name, row.seconds, peak=row.peak, note="; ".join([note, *found["notes"]]))
        if not np.isfinite(found["psnr"]):
            found["psnr"] = None  # the same frames: JSON knows no infinity
        report.rows.append(row)
        report.extra["tilings"].append(found)
    return report


def _one(
    model: FlashVSR,
    frames: np.ndarray,
    tile: int | None,
    overlap: int,
    repeats: int,
    settings: dict[str, Any],
) -> tuple[np.ndarray, Row, dict[str, Any]]:
    notes: list[str] = []
    upscaler = StreamingUpscaler(model, tile=tile, overlap=overlap, note=notes.append, **settings)
    seconds, laid, out = [], None, None

    def run() -> None:
        nonlocal laid, out

        def clip() -> list[np.ndarray]:
            nonlocal laid
            parts = [upscaler.push(frames)]
            laid = upscaler.tiles
            return [*parts, upscaler.flush()]

        parts, spent = measure.timed(clip)
        out = np.concatenate(parts)
        seconds.append(spent)

    peak = max((measure.peak_bytes(run, upscaler.device) or 0 for _ in range(repeats)), default=0) or None
    name = "untiled" if tile is None else f"tile {tile}"
    found = {
        "tile": tile,
        "tiles": len(laid.places),
        "size": list(laid.size),
        "redundancy": laid.redundancy,
        "seconds": statistics.median(seconds),
        "peak_bytes": peak,
        "notes": notes,
    }
    return out, Row(name, found["seconds"], peak=peak), found
