"""The page's pictures: the same frames of all methods under one zoom, and x-t slices, which show flicker."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from eval.datasets import window
from eval.outputs import Outputs
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.page import Crop, Embedded, Page, busiest_crop, embed

_QUALITY = 90  # of JPEG
_NEAR = 4  # what is seen first is this fraction of a picture's sides
_WINDOW = (720, 1280)  # larger frames show their busiest part of this size, in pixels
_SLICE = (96, 640)  # frames and pixels of an x-t slice
_HELP = (
    "All pictures of a clip move together. Drag to move; after a click the wheel zooms, and so do two "
    "fingers. Keys: `+` `-` and arrows; `,` `.` other frame; `1` … `9` that picture alone at full width, "
    "again for all; `0` the whole frame; `d` the detail of the beginning, which is the busiest place."
)
_HELP_SLICES = (
    "One row of pixels, frame after frame downwards: what stands still is a vertical line, what moves "
    "steadily a slanted one, and flicker shows as horizontal stripes that HR does not have."
)


@dataclass
class Budget:
    """Bytes that pictures may still take on the page, and what was left out for it."""

    left: int = 15 * 2**20

    def take(self, pictures: Iterator[Embedded] | list[Embedded]) -> bool:
        """Whether there was room for these, which is then gone."""
        size = sum(len(picture.uri) for picture in pictures)
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass(frozen=True)
class Cut:
    """Where a clip is looked at: a window of its frames (top, left, height, width), a crop and a row in it;
    columns of the row: (first, number). All in pixels of the output and multiples of the scale."""

    window: Crop
    crop: Crop
    row: int
    columns: tuple[int, int]


def side_by_side(page: Page, evaluation: dict[str, Any], budget: Budget, quiet: bool) -> None:
    """Viewers of clips, one set after the other in turns, while there is room."""
    page.heading("Side by side")
    page.text(_HELP)
    page.text(_HELP_SLICES)
    page.protocol(
        [f"Pictures are JPEG of quality {_QUALITY}, LR and slices lossless; scores are of lossless frames."]
    )
    queue = [
        (dataset, clip)
        for turn in zip_longest(*([(d, c) for c in d["clips"]] for d in evaluation["datasets"]))
        for dataset, clip in filter(None, turn)
    ]
    outputs, left_out, gone = Outputs(evaluation), [], []
    with Progress(len(queue), "pictures", unit="clip", quiet=quiet) as progress:
        for dataset, clip in queue:
            place = f"{dataset['name']}, {clip['name']}"
            if left_out:  # one did not fit: no later, smaller one jumps the queue
                left_out.append(place)
                continue
            try:
                seen = _read(evaluation, outputs, dataset, clip)
            except (UserError, OSError) as error:
                gone.append(f"{place}: {error}")
                continue
            if budget.take([p for _, panes in (*seen.frames, seen.slices) for p in panes.values()]):
                _show(page, place, seen)
            else:
                left_out.append(place)
            progress.update(1, clip=clip["name"])
    if left_out:
        page.text(f"Left out, to keep the page small: {'; '.join(left_out)}.")
    if gone:
        page.text(f"Not shown, their frames cannot be read: {'; '.join(gone)}.")


@dataclass(frozen=True)
class Seen:
    """What a clip shows: (label, {pane: picture}) per frame, and of the x-t slice; where; how many frames."""

    frames: list[tuple[str, dict[str, Embedded]]]
    slices: tuple[str, dict[str, Embedded]]
    cut: Cut
    whole: bool  # the window is the whole frame


def _show(page: Page, place: str, seen: Seen) -> None:
    page.heading(place, level=3)
    top, left, height, width = seen.cut.window
    if not seen.whole:
        page.text(f"The busiest {width}x{height} pixels, from column {left} and row {top} on.")
    crop = (seen.cut.crop[0] - top, seen.cut.crop[1] - left, *seen.cut.crop[2:])
    page.viewer(seen.frames, crop=crop)
    label, panes = seen.slices
    reference = list(panes.values())[-1]
    if reference.height > 1:
        page.text(f"{label}:")
        # Strips about an eighth as high as they are wide.
        page.viewer([(label, panes)], strips=max(1, round(reference.width / 8 / reference.height)))


def _read(
    evaluation: dict[str, Any], outputs: Outputs, dataset: dict[str, Any], clip: dict[str, Any]
) -> Seen:
    """Every source of a clip once, from its first frame to the last that is shown."""
    sources = _sources(evaluation, outputs, dataset, clip)
    at = _frames(sources.frames)
    cut = _cut(sources.example(at[len(at) // 2]), dataset["scale"])
    count = max(at[-1] + 1, min(sources.frames, _SLICE[0]))
    frames: list[tuple[str, dict[str, Embedded]]] = [(f"frame {i}", {}) for i in at]
    slices: dict[str, Embedded] = {}
    for name in sources.read:
        scale = dataset["scale"] if name == "LR" else 1
        rows = []
        for i, frame in enumerate(sources.of(name, 0, count)):
            if i < _SLICE[0]:
                first, width = cut.columns
                rows.append(frame[cut.row // scale, first // scale : (first + width) // scale])
            if i in at:
                top, left, height, width = (v // scale for v in cut.window)
                part = frame[top : top + height, left : left + width]
                frames[at.index(i)][1][name] = embed(part, None if name == "LR" else _QUALITY)
        slices[name] = embed(np.stack(rows))
    first, width = cut.columns
    label = f"x-t slice: row {cut.row}, columns {first} to {first + width - 1}, frames 0 to {len(rows) - 1}"
    return Seen(frames, (label, slices), cut, cut.window[2:] == sources.size)


@dataclass(frozen=True)
class Sources:
    """Whose frames of a clip are shown, in order; `frames` and `size` (height, width) are what all have."""

    read: dict[str, Callable[[int, int], Iterator[np.ndarray]]]  # start, count -> frames
    frames: int
    size: tuple[int, int]
    scale: int
    align: str

    def of(self, name: str, start: int, count: int) -> Iterator[np.ndarray]:
        """Frames cut to what all have; of LR, to the same part in its own pixels."""
        height, width = (side // self.scale if name == "LR" else side for side in self.size)
        for frame in self.read[name](start, count):
            yield window(frame, height, width, self.align)

    def example(self, index: int) -> np.ndarray:
        """The frame that tells where to look: of HR, or without it of LR, its pixels repeated to HR's size;
        never of a method, which may be busy where nothing is."""
        if "HR" in self.read:
            return next(iter(self.of("HR", index, 1)))
        small = next(iter(self.of("LR", index, 1)))
        return small.repeat(self.scale, axis=0).repeat(self.scale, axis=1)


def _sources(
    evaluation: dict[str, Any], outputs: Outputs, dataset: dict[str, Any], clip: dict[str, Any]
) -> Sources:
    names = (dataset["name"], clip["name"])
    scores = {s["method"]: s for s in evaluation["scores"] if (s["dataset"], s["clip"]) == names}
    read = {"LR": lambda start, count: outputs.lq(*names, start, count)}
    for method in [m["name"] for m in evaluation["methods"] if m["name"] in scores]:
        read[method] = lambda start, count, m=method: outputs.read(m, *names, start, count)
    if clip["gt"] is not None:
        read["HR"] = lambda start, count: outputs.gt(*names, start, count)
    # An aligned evaluation may have scored less of one method than of another.
    least = [min(x[key] for x in (clip, *scores.values())) for key in ("frames", "height", "width")]
    return Sources(read, least[0], (least[1], least[2]), dataset["scale"], clip["align"])


def _frames(count: int) -> list[int]:
    """Up to three frames of a clip: in the middle, and a sixth from its ends."""
    return sorted({count // 6, count // 2, count - 1 - count // 6})


def _cut(frame: np.ndarray, scale: int) -> Cut:
    """The busiest window, the busiest crop inside it, and the row through its middle."""
    height, width = frame.shape[:2]
    size = (min(height, _WINDOW[0]), min(width, _WINDOW[1]))
    window = busiest_crop(frame, *size) if size != (height, width) else (0, 0, height, width)
    top, left = (v // scale * scale for v in window[:2])
    part = frame[top : top + size[0], left : left + size[1]]
    crop = busiest_crop(part, max(scale, size[0] // _NEAR), max(scale, size[1] // _NEAR))
    row = top + crop[0] + crop[2] // 2
    across = min(width, _SLICE[1]) // scale * scale
    first = min(max(left + crop[1] + crop[3] // 2 - across // 2, 0), width - across) // scale * scale
    return Cut((top, left, *size), (top + crop[0], left + crop[1], *crop[2:]), row, (first, across))
