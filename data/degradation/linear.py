"""Linear maps along one axis of a picture, as dense blocks of a banded matrix.

Separable filters and resizing are such maps. Multiplying with blocks of some 64 outputs and only the inputs
they read is matrix multiplication at its full speed, ten times that of a convolution of two long kernels.
"""

from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 64  # outputs; measured: 32 to 64 are the fastest from 7 to 51 taps


@dataclass(frozen=True)
class Band:
    """A map from `source` to `target` samples: outputs `first:last` are `weights @ inputs[start:stop]`."""

    source: int
    target: int
    blocks: tuple[tuple[int, int, int, int, torch.Tensor], ...]  # first, last, start, stop, weights

    def dense(self) -> torch.Tensor:
        """The whole matrix, float32 `[target, source]`."""
        whole = torch.zeros(self.target, self.source)
        for first, last, start, stop, weights in self.blocks:
            whole[first:last, start:stop] = weights
        return whole


def mirror_index(size: int, before: int, after: int) -> torch.Tensor:
    """Indices that extend 0..size-1 on both sides by mirroring about the first and last sample, however far.

    Returns int64 `[before + size + after]`.
    """
    i = torch.arange(-before, size + after)
    if size == 1:
        return torch.zeros_like(i)
    i = i.abs() % (2 * (size - 1))
    return torch.where(i < size, i, 2 * (size - 1) - i)


def filtering(taps: torch.Tensor, size: int) -> Band:
    """Correlation of `size` samples with `taps` (an odd count), borders mirrored about the edge."""
    count = len(taps)
    reach = count // 2
    width = min(BLOCK, size)
    # Row r of the inner block holds the taps from column r on.
    inner = torch.zeros(width, width + count)
    inner[:, :count] = taps
    inner = inner.flatten()[: width * (width + count - 1)].view(width, width + count - 1)
    blocks = []
    for first in range(0, size, width):
        last = min(first + width, size)
        weights = inner[: last - first, : last - first + count - 1]
        start, stop = first - reach, last + reach
        if start < 0 or stop > size:
            folded = mirror_index(size, reach, reach)[start + reach : stop + reach]
            start, stop = int(folded.min()), int(folded.max()) + 1
            weights = torch.zeros(last - first, stop - start).index_add_(1, folded - start, weights)
        blocks.append((first, last, start, stop, weights))
    return Band(size, size, tuple(blocks))


def sampling(index: np.ndarray, weights: np.ndarray, source: int) -> Band:
    """Outputs as weighted sums of inputs: `index` int and `weights` float `[target, taps]`."""
    target, taps = index.shape
    blocks = []
    for first in range(0, target, BLOCK):
        part, share = index[first : first + BLOCK], weights[first : first + BLOCK]
        start, stop = int(part.min()), int(part.max()) + 1
        dense = np.zeros((len(part), stop - start))
        rows = np.arange(len(part))
        for tap in range(taps):  # taps of one output may meet at a border: added one after the other
            dense[rows, part[:, tap] - start] += share[:, tap]
        blocks.append((first, first + len(part), start, stop, torch.from_numpy(dense).float()))
    return Band(source, target, tuple(blocks))


def separable(x: torch.Tensor, vertical: Band, horizontal: Band) -> torch.Tensor:
    """Maps the columns and the rows of every plane of a picture `C H W`.

    Plane by plane, so that a plane and its half-way result stay in the cache.
    """
    out = x.new_empty(len(x), vertical.target, horizontal.target)
    middle = x.new_empty(vertical.source, horizontal.target)
    for plane, result in zip(x, out, strict=True):
        for first, last, start, stop, weights in horizontal.blocks:
            torch.mm(plane[:, start:stop], weights.T, out=middle[:, first:last])
        for first, last, start, stop, weights in vertical.blocks:
            torch.mm(weights, middle[start:stop], out=result[first:last])
    return out
