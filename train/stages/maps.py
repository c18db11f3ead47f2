"""A plan that remembers, per layer, the block-pooled queries and keys that passed through it."""

from __future__ import annotations

from torch import Tensor

from flashvsr.attention.layout import Block, to_blocks
from flashvsr.attention.plans import Grid, Plan
from flashvsr.attention.selection import pool


class Watched:
    """`plan` as it is; `pooled[layer]` holds queries and keys `B heads blocks d`, with their gradient.

    `grid`: of a dense plan of one segment, whose tokens are put in block order first.
    """

    def __init__(self, plan: Plan, block: Block, grid: Grid | None = None):
        self.plan, self.block, self.grid = plan, block, grid
        self.rope, self.pack, self.unpack, self.spread = plan.rope, plan.pack, plan.unpack, plan.spread
        self.pooled: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.pooled.setdefault(layer, (self._pool(q), self._pool(k)))  # recomputation keeps the first
        return self.plan.attend(layer, q, k, v)

    def _pool(self, x: Tensor) -> Tensor:
        if self.grid is not None:
            x = to_blocks(x.flatten(2).unflatten(1, self.grid), self.block).unflatten(2, x.shape[2:])
        return pool(x.transpose(1, 2), self.block[0] * self.block[1] * self.block[2])

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """`pooled` in the order of layers."""
        return [self.pooled[layer] for layer in sorted(self.pooled)]
