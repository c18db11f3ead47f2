"""FlashVSR: one-step, streaming video super-resolution. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "load": "flashvsr.weights.load",
    "FlashVSR": "flashvsr.weights.folder",
    "ModelInfo": "flashvsr.weights.folder",
    "save_model": "flashvsr.weights.folder",
    "method": "flashvsr.streaming.method",
    "StreamingUpscaler": "flashvsr.streaming.upscaler",
    "ClipUpscaler": "flashvsr.streaming.clip",
    "UserError": "flashvsr.base.cli",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flashvsr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
