"""Full-reference metrics, one file each; the only part of `eval` that training imports.

Importing this package needs torch alone: `Lpips` imports the lpips package when it is built.
"""

from eval.metrics.lpips import Lpips
from eval.metrics.psnr import psnr, psnr_per_frame
from eval.metrics.ssim import ssim, ssim_per_frame

__all__ = ["Lpips", "psnr", "psnr_per_frame", "ssim", "ssim_per_frame"]
