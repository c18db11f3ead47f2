"""Ordered, parallel loading: the same batches for any number of workers and ranks."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from data.clips import Clips, DataConfig, open_dataset
from data.sampler import RankCounters
from flashvsr.base.cli import UserError

__all__ = ["DataConfig", "batches", "collate", "open_dataset"]


def collate(samples: list[dict]) -> dict:
    """Stacks samples: `{ids, counters int64 [B], segments}` with every tensor of a segment `[B, …]`."""
    first = samples[0]["segments"]
    return {
        "ids": [s["id"] for s in samples],
        "counters": torch.tensor([s["counter"] for s in samples]),
        "segments": [
            {name: torch.stack([s["segments"][i][name] for s in samples]) for name in segment}
            for i, segment in enumerate(first)
        ],
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


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def in_order(clips: Clips, counters: Iterable[list[int]], workers: int) -> Iterator[list[dict]]:
    """The samples of each list of counters, in order, made by `workers` processes (0: by this one).

    Raises UserError from any worker.
    """
    loader = DataLoader(
        _Samples(clips),
        batch_size=None,
        sampler=counters,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_one_thread,
        prefetch_factor=2 if workers else None,
    )
    for samples in loader:
        if isinstance(samples, UserError):
            raise samples
        yield samples


def batches(
    clips: Clips, start: int, micro_batch: int, rank: int, world: int, workers: int
) -> Iterator[dict]:
    """The endless batches of one rank from counter `start` on; see `RankCounters` for which.

    `clips` has `.sample(counter)`. Segments are uint8 `hr` `B 3 F H W` and `lr` `B 3 F h w` (and what else a
    sample holds). The order does not depend on `workers` (0: in this process). Raises UserError from any
    worker.
    """
    return map(collate, in_order(clips, RankCounters(start, micro_batch, rank, world), workers))
