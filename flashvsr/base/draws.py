"""Named random draws that depend on nothing but their names.

A draw is a pure function of (seed, step, sample id, name): not of the order of calls, the rank, the world
size or the other samples of the batch. A resumed run therefore needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def _digest(keys: tuple[int | str, ...], size: int) -> int:
    for key in keys:
        if not isinstance(key, (int, str, np.integer)):
            raise TypeError(f"a draw is named by integers and strings, not by {key!r}")
    # numpy's integers print differently from Python's; they must name the same draw.
    plain = tuple(key if isinstance(key, str) else int(key) for key in keys)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=size).digest(), "little")


def seed_of(*keys: int | str) -> int:
    """A 63-bit seed made from the keys; the same on every machine and in every process."""
    return _digest(keys, 8) >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU torch generator for the keys (torch's CPU generator uses the low 32 bits of its seed)."""
    return torch.Generator().manual_seed(seed_of(*keys))


def numpy_rng(*keys: int | str) -> np.random.Generator:
    """A numpy generator for the keys: Philox with the keys' 128-bit hash, so streams never coincide."""
    return np.random.Generator(np.random.Philox(key=_digest(keys, 16)))


class Draw:
    """The draws of one step for the samples `ids`; row i of every draw belongs to `ids[i]`.

    Rows come from Philox with a 128-bit key: torch's CPU generator keeps 32 bits of a seed, and a run makes
    enough rows for two of those to coincide.
    """

    def __init__(self, seed: int, step: int, ids: Sequence[str | int]) -> None:
        self.seed, self.step_number, self.ids = seed, step, tuple(ids)

    def _rows(self, name: str) -> list[np.random.Generator]:
        return [numpy_rng("row", self.seed, self.step_number, i, name) for i in self.ids]

    def normal(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal, float32 on the CPU, [len(ids), *shape]."""
        out = np.empty((len(self.ids), *shape), np.float32)
        for i, rng in enumerate(self._rows(name)):
            out[i] = rng.standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(out)

    def uniform(
        self, name: str, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()
    ) -> torch.Tensor:
        """Uniform between `low` and `high`, float32 on the CPU, [len(ids), *shape]."""
        unit = [rng.random(tuple(shape), dtype=np.float32) for rng in self._rows(name)]
        out = np.stack(unit) if unit else np.empty((0, *shape), np.float32)
        return torch.from_numpy(out) * (high - low) + low

    def step(self, name: str) -> float:
        """One number in [0, 1) for the whole step, the same on every rank whatever its samples."""
        return float(numpy_rng("step", self.seed, self.step_number, name).random())
