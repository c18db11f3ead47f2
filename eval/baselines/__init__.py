"""Methods to be measured against; each has `push(frames)` and `flush()` like our own upscaler."""

from eval.baselines.interpolation import Bicubic, Lanczos

__all__ = ["Bicubic", "Lanczos"]
