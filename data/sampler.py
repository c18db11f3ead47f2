"""Which sample comes when: pure functions of a counter, so that the loader's whole state is one integer."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from flashvsr.base.draws import numpy_rng


@lru_cache(maxsize=16)
def _permutation(seed: int, name: str, size: int, epoch: int) -> np.ndarray:
    return numpy_rng("order", seed, name, size, epoch).permutation(size)


def shuffled(counter: int, size: int, seed: int, name: str) -> int:
    """Entry `counter` of an endless walk over 0 … size-1 that visits all once per epoch, each epoch in a new
    order."""
    epoch, position = divmod(counter, size)
    return int(_permutation(seed, name, size, epoch)[position])


class RankCounters:
    """Lists of the counters of one rank, without end: start + step · micro · world + rank · micro + j.

    All ranks together visit every counter from `start` on exactly once, in order, whatever the world size.
    """

    def __init__(self, start: int, micro_batch: int, rank: int, world: int) -> None:
        self.start, self.micro_batch, self.rank, self.world = start, micro_batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro_batch
        while True:
            yield list(range(first, first + self.micro_batch))
            first += self.micro_batch * self.world
