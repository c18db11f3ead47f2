"""Being told to stop: signals are noted at any time and obeyed by all ranks together at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

import torch

from train.launch import ECHO_SECONDS, STOPPING, World


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGINT while it is entered as a context.

    The first signal asks for a stop after the running step; the same signal again exits the process at once
    with 128 + its number, which leaves the last complete checkpoint as it is. Previous handlers return on
    exit.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._pid = os.getpid()
        self._first: dict[int, float] = {}
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, world: World) -> bool:
        """Whether any rank was told to stop; all ranks must call it at the same step and get the same answer.

        `name` is then the signal's name on every rank.
        """
        own = signal.Signals[self.name].value if self.name else 0
        agreed = int(world.all_reduce_max(torch.tensor(own)))
        if agreed:
            self.name = signal.Signals(agreed).name
        return agreed != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process forked from this one: it is this one that decides
        now = time.monotonic()
        first = self._first.setdefault(number, now)
        if now - first > ECHO_SECONDS:
            os._exit(128 + number)
        if self.name is None:
            self.name = signal.Signals(number).name
            if int(os.environ.get("RANK", "0")) == 0:
                # os.write: print() may be interrupted inside itself by this very handler.
                os.write(2, f"\n{self.name}: stopping after this step; again to stop at once\n".encode())
