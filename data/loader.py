"""Ordered, parallel loading: the same batches for any number of workers and ranks."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.clips import Clips, DataConfig, open_dataset
from data.sampler import RankCounters
from flashvsr.base.cli import UserError

__all__ = ["DataConfig", "batches", "collate", "in_order", "open_dataset"]

PATIENCE = 1800  # seconds without a sample after which a worker is given up: a shard may come slowly


def collate(samples: list[dict]) -> dict[str, Any]:
    """Stacks samples: `{ids, counters int64 [B], segments, damaged}`, every tensor of a segment `[B, …]`;
    `damaged` lists the clips that others had to replace."""
    first = samples[0]["segments"]
    return {
        "ids": [s["id"] for s in samples],
        "counters": torch.tensor([s["counter"] for s in samples]),
        "segments": [
            {name: torch.stack([s["segments"][i][name] for s in samples]) for name in segment}
            for i, segment in enumerate(first)
        ],
        "damaged": [reason for s in samples for reason in s["damaged"]],
    }


class _Samples(Dataset):
    """Map-style: a list of counters to their samples. A user's error travels as a value, since a worker
    would wrap it in a traceback."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, counters: list[int]) -> list[dict] | UserError:
        try:
            return [self.clips.sample(counter) for counter in counters]
        except UserError as error:
            return error


def _as_is(samples):
    return samples


def _begin_worker(ending: Any, worker: int) -> None:
    torch.set_num_threads(1)
    # Whether a run stops is the main process's to say: Ctrl-C and schedulers signal every process of a job.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


def _begun(loader: DataLoader) -> Iterator:
    """Starts the workers. torch's handler of their deaths would raise in whatever the main thread is doing;
    waiting for a sample notices them too, and there it can be said in a sentence."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def in_order(clips: Clips, counters: Iterable[list[int]], workers: int) -> Iterator[list[dict]]:
    """The samples of each list of counters, in order, made by `workers` processes (0: by this one).

    Says on stderr, once each, which clips are damaged. Raises UserError from any worker, and when one dies
    or gives nothing for half an hour.
    """
    samples = _in_order(clips, counters, workers)
    _running.add(samples)
    return samples


_running: weakref.WeakSet[Iterator] = weakref.WeakSet()


@atexit.register  # before multiprocessing's own, which waits for workers that nobody has told to end
def _end_all() -> None:
    for samples in list(_running):
        samples.close()


def _in_order(clips: Clips, counters: Iterable[list[int]], workers: int) -> Iterator[list[dict]]:
    ending = multiprocessing.RawValue("b", 0)
    loader = DataLoader(
        _Samples(clips),
        batch_size=None,
        sampler=counters,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=partial(_begin_worker, ending),
        prefetch_factor=2 if workers else None,
        timeout=PATIENCE if workers else 0,
    )
    iterator, told = _begun(loader), set()
    try:
        while (samples := _next(iterator)) is not None:
            for reason in (reason for sample in samples for reason in sample["damaged"]):
                if reason not in told:
                    told.add(reason)
                    print(f"data: {reason}; another clip stands in its place", file=sys.stderr, flush=True)
            yield samples
    finally:
        ending.value = 1
        del iterator  # a traceback may hold this frame for long: the workers end now


def _next(iterator: Iterator) -> list[dict] | None:
    try:
        samples = next(iterator, None)
    except RuntimeError as error:
        if str(error).startswith("DataLoader timed out"):
            raise UserError(
                f"no sample came for {PATIENCE // 60} minutes: is the storage of the shards gone?"
            ) from error
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"{error}: if the machine ran out of memory, lower data.workers; the same command goes on"
        ) from error
    if isinstance(samples, UserError):
        raise samples
    return samples


def batches(
    clips: Clips, start: int, micro_batch: int, rank: int, world: int, workers: int
) -> Iterator[dict[str, Any]]:
    """The endless batches of one rank from counter `start` on; see `RankCounters` for which.

    `clips` has `.sample(counter)`. Segments are uint8 `hr` `B 3 F H W` and `lr` `B 3 F h w` (and what else a
    sample holds). The order does not depend on `workers` (0: in this process). Raises UserError from any
    worker.
    """
    return map(collate, in_order(clips, RankCounters(start, micro_batch, rank, world), workers))
