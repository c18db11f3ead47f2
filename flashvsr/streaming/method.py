"""The upscaler that goes with a model: anything with `push(frames)` and `flush()` is a method."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from flashvsr.base.cli import UserError
from flashvsr.streaming.clip import ClipUpscaler
from flashvsr.streaming.upscaler import StreamingUpscaler
from flashvsr.weights.folder import FlashVSR

UPSCALERS = {"one-step": StreamingUpscaler, "teacher": ClipUpscaler, "sparse": ClipUpscaler}


def method(model: FlashVSR, **settings: Any) -> StreamingUpscaler | ClipUpscaler:
    """A StreamingUpscaler for a one-step model, a ClipUpscaler for a teacher or a sparse student.

    Raises UserError for a setting the upscaler does not have and for a model that cannot upscale.
    """
    kind = model.info.kind
    if kind not in UPSCALERS:
        raise UserError(f"{model.source} is of kind {kind!r} and cannot upscale: it has no trained DiT")
    upscaler = UPSCALERS[kind]
    known = [name for name in inspect.signature(upscaler).parameters if name != "model"]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"{name!r} has no meaning for a model of kind {kind!r}; {hint}")
    return upscaler(model, **settings)
