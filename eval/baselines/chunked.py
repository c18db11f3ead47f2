"""BasicVSR and IconVSR on a stream: chunk after chunk, with frames of context or carried state.

A bidirectional network sees the future. Cut into chunks of `interval` frames it sees it up to the chunk's
end, and no frame can come out before that end has come in: this is its latency, whatever the machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.baselines.basicvsr import SCALE, Memory
from eval.baselines.weights import Network
from flashvsr.base.cli import UserError
from flashvsr.streaming.frames import check_frames, no_frames

SMALLEST = 4  # pixels of a side; IconVSR cannot reflect fewer up to a multiple of 4


class Chunked:
    """`network` on a clip pushed in pieces of any size; as many frames come out as went in.

    interval: frames of a chunk; None takes the whole clip as one and holds it until flush. The last chunk of
    a clip may be shorter. Without what follows every chunk is a clip of its own (BasicSR's `--interval`).
    overlap: frames of context given on both sides of a chunk and not put out; the later ones delay it.
    carry: the forward pass goes on from chunk to chunk with its features, so that only the backward pass
    begins anew; context is then needed, and taken, only on the side of the future.

    What comes out never depends on how frames were pushed. Raises UserError for settings out of range.
    """

    scale = SCALE

    def __init__(self, network: Network, *, interval: int | None = 15, overlap: int = 0, carry: bool = False):
        if interval is not None and (type(interval) is not int or interval < 1):
            raise UserError(f"interval={interval!r} must be a whole number of frames from 1 on, or none")
        if type(overlap) is not int or overlap < 0:
            raise UserError(f"overlap={overlap!r} must be a whole number of frames from 0 on")
        if type(carry) is not bool:
            raise UserError(f"carry={carry!r} must be true or false")
        if interval is None and (overlap or carry):
            raise UserError(
                "overlap and carry have no effect with interval=none: the whole clip is one chunk"
            )
        self.network, self.interval, self.overlap, self.carry = network, interval, overlap, carry
        weight = network.module.conv_last.weight
        self.device, self.dtype = weight.device, weight.dtype
        self._reset()

    @property
    def delay_frames(self) -> int | None:
        """Frames that must come in after a frame before it comes out, for the first of a chunk (the last one
        waits for `overlap` frames only); None: all of the clip."""
        return None if self.interval is None else self.interval - 1 + self.overlap

    @property
    def in_use(self) -> dict[str, Any]:
        """What was chosen, for a report; weights that were never trained are named as such."""
        whole = self.interval is None
        chosen = {
            "method": f"{self.network.name}, bidirectional, " + ("whole clip" if whole else "by chunks"),
            "weights": self.network.weights,
            "precision": str(self.dtype).removeprefix("torch.") + ", flow float32",
            "device": str(self.device),
        }
        if not whole:
            chosen |= {
                "interval": self.interval,
                "overlap": self.overlap,
                "carry": self.carry,
                "delay_frames": self.delay_frames,
            }
        return chosen

    def _reset(self) -> None:
        self._held: list[Tensor] = []  # frames still needed, uint8 H W 3
        self._first = 0  # index in the clip of the first one held
        self._next = 0  # index of the first frame that has not come out
        self._memory: Memory | None = None

    @property
    def _count(self) -> int:
        return self._first + len(self._held)

    def push(self, frames: np.ndarray | Tensor) -> np.ndarray:
        """Takes uint8 `F H W 3`, gives the uint8 `F' 4H 4W 3` whose chunks are complete.

        UserError for frames of another size than before, or with a side shorter than 4 pixels.
        """
        x = check_frames(frames)
        height, width = x.shape[1:3]
        if self._held and x.shape[1:] != self._held[0].shape:
            before = self._held[0].shape
            raise UserError(
                f"a frame of {height}x{width} after frames of {before[0]}x{before[1]}: flush before a clip "
                f"of another size"
            )
        if min(height, width) < SMALLEST:
            raise UserError(
                f"{self.network.name} takes frames from {SMALLEST}x{SMALLEST} on, not {height}x{width}"
            )
        self._held.extend(frame.clone() for frame in x)
        out = []
        while self.interval is not None and self._count >= self._next + self.interval + self.overlap:
            out.append(self._chunk(self.interval))
        return np.concatenate(out) if out else np.empty((0, height * SCALE, width * SCALE, 3), np.uint8)

    def flush(self) -> np.ndarray:
        """The rest, as if the clip ended here, which it does: then another may begin."""
        out = []
        while (left := self._count - self._next) > 0:
            out.append(self._chunk(min(left, self.interval or left)))
        self._reset()
        return np.concatenate(out) if out else no_frames()

    @torch.inference_mode()
    def _chunk(self, frames: int) -> np.ndarray:
        """The next `frames` frames, from those held."""
        stop = self._next + frames
        begin = self._next if self.carry else max(self._next - self.overlap, 0)
        end = min(stop + self.overlap, self._count)
        window = torch.stack(self._held[begin - self._first : end - self._first]).to(self.device)
        x = window.permute(0, 3, 1, 2)[None].float() / 255
        y, memory = self.network.module(
            x,
            self._memory,
            behind=self._next - begin,
            ahead=end - stop,
            start=begin if self.carry or self.overlap else 0,
        )
        self._memory = memory if self.carry else None
        self._next = stop
        needed = stop if self.carry else stop - self.overlap
        if needed > self._first:
            # The last frame stays in any case: it tells the size of the clip.
            gone = min(needed - self._first, len(self._held) - 1)
            self._held, self._first = self._held[gone:], self._first + gone
        return (y[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
