"""What a student may see at a step: the random attention window of stages 2 and 3, in chunks (a leftover of
training in the released code), and the share of blocks within it."""

from __future__ import annotations

import math

OFFSETS = ((-3, 0.3), (-4, 0.1), (-2, 0.1), (0, 0.5))


def draw_window(
    chunks: int, choice: float, history: float, *, random_window: bool, random_history: bool
) -> int:
    """Chunks a chunk sees, itself included.

    w = chunks + one of OFFSETS with its probability (`choice` uniform in [0,1)); h = floor(2 + u^2 (w - 4))
    past chunks (`history` = u); window = min(w, h + 1) within [3, chunks]. Without the history the window of
    inference (4) would hardly ever be trained.
    """
    w = chunks
    if random_window:
        edge = 0.0
        for offset, probability in OFFSETS:
            edge += probability
            if choice < edge:
                w = chunks + offset
                break
    window = w
    if random_history:
        window = min(w, math.floor(2 + history**2 * (w - 4)) + 1)
    return min(max(window, 3), chunks)


def ramped(step: int, ratio: float | None, start: float | None, ramp: int) -> float | None:
    """The sparse_ratio of a step (0 is the first): from `start` linearly to `ratio` over `ramp` steps."""
    if step < 0 or step >= ramp:  # validation draws are those of step -1
        return ratio
    return start + (ratio - start) * step / ramp
