"""Metrics, one file each; the only part of `eval` that training imports.

`metrics_for(names).start()` scores a clip as it comes, a few frames at a time (see `scoring`); `psnr`, `ssim`
and `Lpips` score whole clips. Importing this package needs torch alone: what a metric needs beyond it is
imported when that metric is built.
"""

from eval.metrics.catalogue import NAMES, metrics_for
from eval.metrics.lpips import Lpips
from eval.metrics.psnr import psnr, psnr_per_frame
from eval.metrics.scoring import Metric, Scoring, Suite, Values
from eval.metrics.ssim import ssim, ssim_per_frame

__all__ = [
    "NAMES",
    "Lpips",
    "Metric",
    "Scoring",
    "Suite",
    "Values",
    "metrics_for",
    "psnr",
    "psnr_per_frame",
    "ssim",
    "ssim_per_frame",
]
