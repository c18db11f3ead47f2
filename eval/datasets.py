"""Test sets: pairs of an HR clip (GT) and a degraded LR clip (LQ) under one folder.

    DIR/GT/<clip>/frame-*.png    DIR/LQ/<clip>/frame-*.png    DIR/prepare.json (optional: how LQ was made)

A clip may also be a video file; the two sides are matched by name without suffix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json
from flashvsr.base.video_io import list_clips, probe, read_frames


@dataclass(frozen=True)
class Pair:
    """One clip of a test set; `frames` is how many are evaluated, `total` how many there are."""

    name: str
    lq: Path
    gt: Path
    frames: int
    total: int
    height: int  # of GT, in pixels
    width: int

    def read_gt(self) -> Iterator[np.ndarray]:
        """The evaluated HR frames, uint8 `H W 3`."""
        return read_frames(self.gt, count=self.frames)

    def read_lq(self, together: int) -> Iterator[np.ndarray]:
        """The evaluated LR frames in stacks of up to `together`, uint8 `F h w 3`."""
        stack = []
        for frame in read_frames(self.lq, count=self.frames):
            stack.append(frame)
            if len(stack) == together:
                yield np.stack(stack)
                stack = []
        if stack:
            yield np.stack(stack)


@dataclass(frozen=True)
class TestSet:
    """All pairs of a folder, their common scale, and what prepare.json says about them (or nothing)."""

    __test__ = False  # the name is no test class

    folder: Path
    pairs: tuple[Pair, ...]
    scale: int
    prepared: dict[str, Any]


def open_test_set(folder: str | Path, frames: int | None = None) -> TestSet:
    """Find the pairs under `folder` and check counts and sizes; `frames` keeps the first so many of each.

    Raises UserError when there is no pair, a clip has no partner, LQ and GT differ in their number of
    frames, a clip has fewer than `frames`, or the sizes are not one whole factor apart.
    """
    folder = Path(folder)
    gt, lq = _by_name(folder / "GT"), _by_name(folder / "LQ")
    alone = sorted(gt.keys() ^ lq.keys())
    if alone:
        side = "GT" if alone[0] in gt else "LQ"
        raise UserError(f"{folder}: clip {alone[0]!r} is only under {side}; every clip needs both GT and LQ")
    pairs, scales = [], {}
    for name in sorted(gt):
        pair, scale = _pair(name, lq[name], gt[name], frames)
        pairs.append(pair)
        scales.setdefault(scale, name)
    if len(scales) > 1:
        found = ", ".join(f"x{scale} ({name})" for scale, name in scales.items())
        raise UserError(f"{folder} mixes scales: {found}; evaluate them one at a time")
    prepared = folder / "prepare.json"
    return TestSet(folder, tuple(pairs), next(iter(scales)), read_json(prepared) if prepared.exists() else {})


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; a test set has the folders GT and LQ "
            f"(`python -m eval prepare SRC {folder.parent}` makes them)"
        )
    clips: dict[str, Path] = {}
    for path in list_clips(folder):
        name = path.name if path.is_dir() else path.stem
        if name in clips:
            raise UserError(
                f"{folder} holds clip {name!r} twice: {clips[name].name} and {path.name}; remove one"
            )
        clips[name] = path
    if not clips:
        raise UserError(f"{folder} holds no video, image or folder of frames")
    return clips


def _pair(name: str, lq: Path, gt: Path, frames: int | None) -> tuple[Pair, int]:
    (lq_count, lq_height, lq_width), (count, height, width) = measure_clip(lq), measure_clip(gt)
    if lq_count != count:
        raise UserError(
            f"clip {name!r} has {lq_count} LQ frames but {count} GT frames; they must be the same"
        )
    if frames is not None and count < frames:
        raise UserError(f"clip {name!r} has only {count} frames, not {frames}; lower --frames")
    scale = height // lq_height
    if scale < 1 or (height, width) != (scale * lq_height, scale * lq_width):
        sizes = f"{width}x{height} in GT and {lq_width}x{lq_height} in LQ"
        raise UserError(f"clip {name!r} is {sizes}; GT must be a whole multiple of LQ")
    return Pair(name, lq, gt, frames or count, count, height, width), scale


def measure_clip(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a clip; a container that does not tell its frames is decoded once."""
    info = probe(path)
    frames = info.frames if info.frames is not None else sum(1 for _ in read_frames(path))
    return frames, info.height, info.width


def window(frame: np.ndarray, height: int, width: int, align: str) -> np.ndarray:
    """The part of a frame `H W 3` that is scored: the top left `height` x `width`, or with "center" the
    middle."""
    top = left = 0
    if align == "center":
        top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return frame[top : top + height, left : left + width]
