"""Packages that import torchvision, beside a torchvision whose compiled operators do not fit this torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_stub: torch.library.Library | None = None  # must outlive torchvision, which looks its operators up lazily


def declare_torchvision() -> None:
    """Makes `import torchvision` work, and so lpips, transformers and diffusers, before they are imported.

    torchvision fails at import when its C++ library does not load (a CUDA wheel beside a CPU torch), for want
    of two operators that none of these calls here; declaring them is enough. Without torchvision, or with one
    that fits, nothing happens.
    """
    global _stub
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or _stub is not None or _operators_load(Path(spec.origin).parent):
        return
    _stub = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _stub.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _operators_load(folder: Path) -> bool:
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(library)
            return True
        except OSError:
            continue
    return False
