"""Work beside work: a part of every call in a thread of its own and, on a GPU, on a stream of its own.

What goes between host and GPU goes through pinned memory: an upload is queued behind what its stream has to
do and nobody waits for it; a download waits for its own stream only. Elsewhere these are plain copies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`. A few MB of LR frames and noise per call: no copy stream of its own would pay."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def download(x: Tensor) -> np.ndarray:
    """The finished content of `x`, waiting for the current stream only."""
    if x.device.type != "cuda":
        return x.cpu().numpy()
    host = x.to("cpu", non_blocking=True)  # lies in pinned memory
    torch.cuda.current_stream(x.device).synchronize()
    return host.numpy()


def borrow(tensors: Iterable[Tensor]) -> None:
    """Of tensors that another stream has made: their memory is not given away before the current stream is
    done with them."""
    for x in tensors:
        if x.device.type == "cuda":
            x.record_stream(torch.cuda.current_stream(x.device))


def worthwhile(device: torch.device) -> bool:
    """Whether there is anything to work beside: a GPU, or cores that torch's threads leave idle."""
    if device.type != "cpu":
        return device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * torch.get_num_threads() <= cores


class Beside:
    """Runs one piece of work after another beside the caller.

    Each begins after all that the caller's stream had been given by then; what it returns must have been
    waited for (`download`). An error is raised by the future's `result()`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "beside")

    def __call__(self, work: Callable[[], T]) -> Future[T]:
        ready = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        return self._pool.submit(self._run, work, ready)

    def _run(self, work: Callable[[], T], ready: torch.cuda.Event | None) -> T:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            return work()

    def close(self) -> None:
        """Ends the thread, after all that it was given."""
        self._pool.shutdown()
