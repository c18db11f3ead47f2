"""What a clip will take before it is upscaled: memory by the preflight, time by two calls of the model."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from flashvsr.base import measure
from flashvsr.base.cli import UserError, clock
from flashvsr.base.footage import Footage
from flashvsr.streaming.preflight import FIRST_FRAMES, STEP_FRAMES
from flashvsr.streaming.upscaler import StreamingUpscaler


def forecast(method: Any, footage: Footage) -> str:
    """Two lines for people. The time is the model's, on this machine as busy as it is now; reading and
    writing go on beside it. UserError for a method that does not stream and for what it refuses."""
    if not isinstance(method, StreamingUpscaler):
        raise UserError("--estimate needs a one-step model: others take a clip in one piece")
    with footage:
        frames = np.stack(list(itertools.islice(footage, FIRST_FRAMES + STEP_FRAMES)))
    out, seconds = measure.timed(lambda: method.push(frames[:FIRST_FRAMES]))
    memory = f"memory: about {method.memory}, tiles: {method.in_use['tiles']}"
    if len(frames) < FIRST_FRAMES + STEP_FRAMES:  # that is all of the clip
        seconds += measure.timed(lambda: (method.push(frames[FIRST_FRAMES:]), method.flush()))[1]
        return f"{memory}\ntime: about {clock(seconds)} for {len(frames)} frames"
    each = measure.timed(lambda: method.push(frames[FIRST_FRAMES:]))[1]
    method.flush()
    if footage.frames is None:
        return f"{memory}\ntime: {each / STEP_FRAMES:.3g} s per frame, of an unknown number"
    calls = -(-(footage.frames - len(out)) // STEP_FRAMES)
    return (
        f"{memory}\ntime: about {clock(seconds + calls * each)} for {footage.frames} frames: "
        f"a first call of {seconds:.3g} s and {calls} of {each:.3g} s"
    )
