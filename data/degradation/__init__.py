"""Synthetic degradations: `degrade(frames, scale, preset, rng)` turns HR frames into LR frames."""

from data.degradation.pipeline import degrade
from data.degradation.presets import PRESETS, preset

__all__ = ["PRESETS", "degrade", "preset"]
