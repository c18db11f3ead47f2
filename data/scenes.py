"""Where a video cuts from one scene to the next, from small grey pictures of its frames.

Ours. With Y_t the luma of frame t at 64x36, a frame is compared with the one before it by

    s_t = mean |Y_t - Y_t-1|  +  mean |sort(Y_t) - sort(Y_t-1)|

(levels of 255): what moved, and how far the distribution of brightness moved (its 1-Wasserstein distance).
Frame t opens a new scene when s_t is at least LEAST and stands out: at least RATIO times the second largest
of the eight values before it and of the eight after it. The second largest, because one neighbour may be a
cut itself, while motion, also of animation drawn on threes, shows more than once. A flash of up to three
frames is no cut: what comes after it looks like what was before. Fades and dissolves are not found.
"""

import numpy as np

SIZE = (36, 64)  # height, width of the grey pictures
LEAST = 20.0  # on real footage changes of exposure stay below it, cuts between scenes are at 50 and more
RATIO = 2.5
REACH = 8  # frames looked at on each side
FLASH = 3  # frames a flash may last


class CutDetector:
    """Takes the pictures in order; `cuts` says where scenes begin."""

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []  # the last FLASH + 1 pictures
        self._sorted: np.ndarray | None = None
        self.scores: list[float] = []  # s_t, 0 for the first frame
        self._back: list[list[float]] = []  # mean |Y_t - Y_t-k|, k = 1 … FLASH + 1

    def push(self, picture: np.ndarray) -> None:
        """The next frame's luma, uint8 `36 64`."""
        if picture.shape != SIZE or picture.dtype != np.uint8:
            raise ValueError(f"a picture is uint8 {SIZE}, not {picture.dtype} {picture.shape}")
        picture = picture.astype(np.int16)
        ordered = np.sort(picture, axis=None)
        back = [float(np.abs(picture - p).mean()) for p in reversed(self._last)]
        moved = 0.0 if self._sorted is None else float(np.abs(ordered - self._sorted).mean())
        self.scores.append(back[0] + moved if back else 0.0)
        self._back.append(back)
        self._last = [*self._last[-FLASH:], picture]
        self._sorted = ordered

    def cuts(self) -> list[int]:
        """The numbers of the frames that open a scene, without frame 0, in order."""
        return [t for t in range(1, len(self.scores)) if self._is_cut(t)]

    def _is_cut(self, t: int) -> bool:
        score = self.scores[t]
        if score < LEAST:
            return False
        sides = (self.scores[max(1, t - REACH) : t], self.scores[t + 1 : t + 1 + REACH])
        usual = max((sorted(side)[-2] for side in sides if len(side) > 1), default=0.0)
        return score >= RATIO * usual and not self._in_flash(t)

    def _in_flash(self, t: int) -> bool:
        """Whether what was before t comes back soon after it, or what comes at t was there shortly before."""
        step = self._back[t][0]
        after = [self._back[t + k][k] for k in range(1, FLASH + 1) if t + k < len(self._back)]
        before = self._back[t][1:]
        return min(after + before, default=step) < 0.5 * step


def ranges(
    frames: int, cuts: list[int], most: int, least: int, edges: tuple[int, ...] = ()
) -> list[tuple[int, int]]:
    """Clips (start, length) of a video of `frames` frames: scenes, those longer than `most` in equal parts.

    No clip crosses one of `edges`; those shorter than `least` are left out.
    """
    bounds = sorted({0, frames, *cuts, *edges})
    clips = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        parts = -(-(end - start) // most)
        marks = [start + (end - start) * i // parts for i in range(parts + 1)]
        clips += [(a, b - a) for a, b in zip(marks, marks[1:], strict=False) if b - a >= least]
    return clips
