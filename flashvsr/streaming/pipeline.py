"""Frames in, frames out: the one loop around any method with `push` and `flush`, sequential or overlapped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashvsr.base.threads import ahead, behind

TOGETHER = 8  # frames per push: what a stream takes at once


@dataclass
class Times:
    """Where a run's seconds went. Reading and writing are their own threads' work when overlapped."""

    frames: int = 0
    total: float = 0.0
    read: float = 0.0
    model: float = 0.0
    write: float = 0.0
    read_wait: float = 0.0  # the model waited for frames
    write_wait: float = 0.0  # the model waited for room in the queue
    first: float | None = None  # from the start to the first frames that the method gave
    pushes: list[tuple[float, int]] = field(default_factory=list)  # seconds and frames given, one per push


def stacks(frames: Iterable[np.ndarray], together: int = TOGETHER) -> Iterator[np.ndarray]:
    """uint8 `H W 3` frames as stacks `F H W 3` of up to `together`; what came before an error comes too."""
    waiting: list[np.ndarray] = []
    try:
        for frame in frames:
            waiting.append(frame)
            if len(waiting) == together:
                yield np.stack(waiting)
                waiting = []
    except Exception:
        if waiting:
            yield np.stack(waiting)
        raise
    if waiting:
        yield np.stack(waiting)


def run(
    method: Any,
    frames: Iterable[np.ndarray],
    write: Callable[[np.ndarray], Any],
    *,
    overlap: bool = True,
    depth: int = 2,
    on_frames: Callable[[int], Any] | None = None,
) -> Times:
    """Reads `frames`, pushes them through `method`, hands what comes out (never empty) to `write`, in order.

    overlap: read and write in threads of their own, at most `depth` stacks ahead and behind, so that memory
    does not grow with the clip; the output is the same bits either way. on_frames is called with the number
    of frames that each push gave. An error of any of the three is raised here, and the others have ended.
    """
    times, begin, depth = Times(), time.perf_counter(), depth if overlap else 0
    with ahead(stacks(frames), depth) as incoming, behind(write, depth) as outgoing:
        for stack in incoming:
            _one(times, begin, lambda stack=stack: method.push(stack), outgoing, on_frames)
        _one(times, begin, method.flush, outgoing, on_frames)
    times.total = time.perf_counter() - begin
    times.read, times.write = incoming.busy, outgoing.busy
    times.read_wait, times.write_wait = incoming.waited, outgoing.waited
    return times


def _one(
    times: Times,
    begin: float,
    step: Callable[[], Any],
    write: Callable[[np.ndarray], Any],
    on_frames: Callable[[int], Any] | None,
) -> None:
    start = time.perf_counter()
    out = np.asarray(step())
    end = time.perf_counter()
    times.model += end - start
    times.pushes.append((end - start, len(out)))
    if len(out):
        if times.first is None:
            times.first = end - begin
        times.frames += len(out)
        write(out)
    if on_frames is not None:
        on_frames(len(out))
