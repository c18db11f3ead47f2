"""Block order: token grids cut into blocks of (2, rows, columns), blocks time-major."""

from __future__ import annotations

from torch import Tensor

from flashvsr.base.cli import UserError

Block = tuple[int, int, int]


def check_grid(grid: tuple[int, int, int], block: Block) -> None:
    """Raises UserError unless a token grid `f h w` divides into whole blocks."""
    if any(size % b for size, b in zip(grid, block, strict=True)):
        raise UserError(
            f"a token grid of {grid} (latents, rows, columns) does not divide into blocks of {block}; "
            f"use an even number of latents and sides in multiples of {16 * block[1]} x {16 * block[2]}"
        )


def to_blocks(grid: Tensor, block: Block) -> Tensor:
    """`B f h w C` -> `B (f h w) C`, blocks in time-major order, tokens inside a block likewise."""
    b, f, h, w, c = grid.shape
    t, r, s = block
    x = grid.reshape(b, f // t, t, h // r, r, w // s, s, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, f * h * w, c)


def from_blocks(tokens: Tensor, grid: tuple[int, int, int], block: Block) -> Tensor:
    """Inverse of `to_blocks`: `B (f h w) C` -> `B f h w C`."""
    f, h, w = grid
    t, r, s = block
    x = tokens.reshape(tokens.shape[0], f // t, h // r, w // s, t, r, s, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(tokens.shape[0], f, h, w, -1)
