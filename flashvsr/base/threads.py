"""Reading ahead and writing behind: one thread each, bounded queues, the order and the errors kept.

    with ahead(stacks) as incoming, behind(sink.write) as write:
        for stack in incoming:
            write(method.push(stack))

gives what the same loop without the two threads gives, while reading, computing and writing overlap.
Decoders, encoders and torch release the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END = object()
_POLL_SECONDS = 0.1  # how soon a thread that waits sees that the other side has ended


class ahead(Generic[T]):  # noqa: N801 - read like a function at its use
    """Iterates over `source` in a thread, at most `depth` items ahead of whoever takes them.

    An error of the source is raised at the item where it happened. `waited` is the seconds its taker spent
    waiting, `busy` those the source took. Leaving the block early ends the thread before its next item.
    depth 0 is the plain loop, without a thread.
    """

    def __init__(self, source: Iterable[T], depth: int = 2):
        self._source, self._queue = source, queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if depth else None
        self.waited = self.busy = 0.0

    def __enter__(self) -> ahead[T]:
        if self._thread is not None:
            self._thread.start()
        return self

    def __iter__(self) -> Iterator[T]:
        if self._thread is None:
            for item in self._timed():
                self.waited = self.busy
                yield item
            return
        while True:
            begin = time.perf_counter()
            kind, item = self._queue.get()
            self.waited += time.perf_counter() - begin
            if kind is _END:
                if item is not None:
                    raise item
                return
            yield item

    def _timed(self) -> Iterator[T]:
        items = iter(self._source)
        while True:
            begin = time.perf_counter()
            item = next(items, _END)
            self.busy += time.perf_counter() - begin
            if item is _END:
                return
            yield item

    def _run(self) -> None:
        error = None
        try:
            for item in self._timed():
                self._put((None, item))
                if self._stop.is_set():
                    break
        except BaseException as caught:  # handed to the taker, who raises it
            error = caught
        self._put((_END, error))

    def _put(self, entry: tuple[Any, Any]) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class behind(Generic[T]):  # noqa: N801
    """Calls `sink(item)` in a thread for every item it is called with, at most `depth` items behind.

    An error of the sink is raised at the next call, or when the block ends well; what came after it is
    dropped. The block ends when all is written; one that is left by an error drops what waits. `waited` is
    the seconds the caller spent waiting for room, `busy` those the sink took. depth 0 calls the sink at once,
    without a thread.
    """

    def __init__(self, sink: Callable[[T], Any], depth: int = 2):
        self._sink, self._queue = sink, queue.Queue(depth)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, daemon=True) if depth else None
        self.waited = self.busy = 0.0

    def __enter__(self) -> behind[T]:
        if self._thread is not None:
            self._thread.start()
        return self

    def __call__(self, item: T) -> None:
        self._check()
        begin = time.perf_counter()
        if self._thread is None:
            self._timed(item)
        else:
            self._queue.put(item)
        self.waited += time.perf_counter() - begin

    def _timed(self, item: T) -> None:
        begin = time.perf_counter()
        try:
            self._sink(item)
        finally:
            self.busy += time.perf_counter() - begin

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            if self._dropping or self._error is not None:
                continue
            try:
                self._timed(item)
            except BaseException as caught:  # raised where the caller is
                self._error = caught

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropping = kind is not None
        if self._thread is not None:
            self._queue.put(_END)
            self._thread.join()
        if kind is None:
            self._check()
