"""The state of a running StreamingUpscaler as a value: saved, it goes on elsewhere with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.streaming.stream import TOKEN_PIXELS, Stream
from flashvsr.streaming.tiling import TiledStream
from flashvsr.streaming.upscaler import StreamingUpscaler

_OWN = ("_past", "_waiting", "_last", "_position", "_owed")
_OF_STREAM = ("next_latent", "projector_memory", "decoder_memory", "pending")
_OF_RING = ("chunks", "keys", "values", "pooled")


def state_of(upscaler: StreamingUpscaler) -> dict[str, Any]:
    """Plain tensors, numbers and containers, all copied to the host: about what the stream holds on its
    device. The clip must have begun, and no call be under way (`settle`)."""
    assert not upscaler._calls
    stream = upscaler._stream
    tiled = isinstance(stream, TiledStream)
    return {
        "lr_size": tuple(upscaler._canvas.lr_size),
        "tiles": str(upscaler._tiles),
        "upscaler": {name: _kept(getattr(upscaler, name)) for name in _OWN},
        "tiled_pending": _kept(stream.pending) if tiled else None,
        "streams": [
            {name: _kept(getattr(s, name)) for name in _OF_STREAM}
            | {"ring": None if s.ring is None else {name: _kept(getattr(s.ring, name)) for name in _OF_RING}}
            for s in (stream.streams if tiled else [stream])
        ],
    }


def restore(upscaler: StreamingUpscaler, state: dict[str, Any]) -> None:
    """Puts an upscaler with the same model and settings, at the start of a clip, where the other one was.

    UserError where it has chosen other tiles (the memory was another)."""
    upscaler.flush()
    upscaler.push(np.empty((0, *state["lr_size"], 3), np.uint8))
    if str(upscaler._tiles) != state["tiles"]:
        raise UserError(
            f"the picture was cut into tiles: {state['tiles']}, now it would be {upscaler._tiles}; give the "
            f"same --tile, or start again"
        )
    for name, value in state["upscaler"].items():
        setattr(upscaler, name, value)
    stream = upscaler._stream
    tiled = isinstance(stream, TiledStream)
    home = "cpu" if upscaler.tiling.offload else upscaler.device
    if tiled:
        stream.pending = _moved(state["tiled_pending"], upscaler.device)
    for one, kept in zip(stream.streams if tiled else [stream], state["streams"], strict=True):
        _restore_stream(one, kept, upscaler._tiles.size, home, upscaler.device)


def _restore_stream(
    stream: Stream, kept: dict[str, Any], size: tuple[int, int], home: Any, device: Any
) -> None:
    for name in _OF_STREAM:
        where = device if name == "projector_memory" else home
        setattr(stream, name, _moved(kept[name], where))
    if kept["ring"] is None:
        return
    stream._begin(size[0] // TOKEN_PIXELS, size[1] // TOKEN_PIXELS)
    for name in _OF_RING:
        setattr(stream.ring, name, _moved(kept["ring"][name], home))


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return type(value)(map(_kept, value)) if isinstance(value, (tuple, list)) else value


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(_moved(v, device) for v in value) if isinstance(value, (tuple, list)) else value
