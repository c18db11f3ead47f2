"""Metrics by name: the only place that knows them all."""

from collections.abc import Iterable

import torch

from eval.metrics.lpips import Lpips, lpips_metric
from eval.metrics.psnr import PSNR, PSNR_Y
from eval.metrics.scoring import Metric, Suite
from eval.metrics.ssim import SSIM, SSIM_Y
from flashvsr.base.cli import UserError

NAMES = ("psnr", "psnr_y", "ssim", "ssim_y", "lpips")


def metrics_for(
    names: Iterable[str],
    *,
    crop: int = 0,
    device: str | torch.device = "cpu",
    lpips: Lpips | None = None,
) -> Suite:
    """The metrics of these names (`NAMES`), in this order, on `device`, after cropping `crop` pixels off each
    side. `lpips` is a network already there; without it one is built as `Lpips()` when a name needs it.

    A key of the result may differ from its name: "lpips" without weights is `lpips-random`.
    Raises UserError for an unknown or repeated name, a negative crop, a missing package or missing weights.
    """
    names = list(names)
    if crop < 0:
        raise UserError(f"a border crop is 0 or more pixels, not {crop}")
    if len(set(names)) < len(names):
        raise UserError(f"a metric is named twice in {', '.join(names)}")
    made: list[Metric] = []
    for name in names:
        if name not in NAMES:
            raise UserError(f"unknown metric {name!r}; known are {', '.join(NAMES)}")
        if name in ("lpips", "tlpips") and lpips is None:
            lpips = Lpips()
        made.append(_made(name, lpips.to(device) if lpips is not None else None))
    return Suite(tuple(made), crop, device)


def _made(name: str, lpips: Lpips | None) -> Metric:
    plain = {metric.key: metric for metric in (PSNR, PSNR_Y, SSIM, SSIM_Y)}
    return lpips_metric(lpips) if name == "lpips" else plain[name]
