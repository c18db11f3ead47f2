"""Methods to be measured against; each has `push(frames)` and `flush()` like our own upscaler."""

from eval.baselines.bicubic import Bicubic

__all__ = ["Bicubic"]
