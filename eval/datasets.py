"""Test sets: LQ clips, and where there is one the HR clip (GT) of each, under one folder.

    DIR/GT/<clip>/000.png ...     DIR/LQ/<clip>/000.png ...       sides outside, clips inside
    DIR/<clip>/truth/000.png ...  DIR/<clip>/blur4/000.png ...    clips outside, sides inside (UDM10, SPMCS)
    DIR/<clip>/000.png ...                                        no side named: LQ only (VideoLQ)

A clip is a video file or a folder of frames; the sides are matched by clip name without suffix. `SIDES`
lists the folder names of the usual sets; where a set has several of a side, the user says which.
`DIR/prepare.json`, if there, says how LQ was made.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json
from flashvsr.base.video_io import list_clips, probe, read_frames

FORMS = "DIR or NAME=DIR[,gt=FOLDER][,lq=FOLDER][,scale=N][,clips=A+B+...]"
ALIGN = ("refuse", "first", "top-left", "center")
# Folder names of GT and LQ, first choices and second; of two in one group the user chooses.
SIDES = {
    "gt": (("GT", "HR", "truth", "val_sharp", "train_sharp", "GT_test"), ("GT-Video",)),
    "lq": (
        (
            *("LQ", "LR", "Input", "BDx4", "BIx4", "blur4", "bicubic4", "LQ_test", "sharp_bicubic"),
            *("val_sharp_bicubic/X4", "train_sharp_bicubic/X4"),
        ),
        ("LQ-Video",),
    ),
}
# Sets that are a few clips of a larger folder, known by the name the user gives.
SUBSETS = {"REDS4": ("000", "011", "015", "020")}


@dataclass(frozen=True)
class Clip:
    """One clip of a test set as it is evaluated: the first `frames` of `total`, cut to `height` x `width`.

    Height and width are those of GT, or LQ's times the scale where there is none. `note` says what `--align`
    cut, or is empty.
    """

    name: str
    lq: Path
    gt: Path | None
    frames: int
    total: int
    height: int
    width: int
    align: str = "refuse"
    note: str = ""

    def read_gt(self) -> Iterator[np.ndarray]:
        """The evaluated HR frames, uint8 `H W 3`."""
        if self.gt is None:
            raise ValueError(f"clip {self.name!r} has no GT")
        for frame in read_frames(self.gt, count=self.frames):
            yield window(frame, self.height, self.width, self.align)

    def read_lq(self) -> Iterator[np.ndarray]:
        """The evaluated LR frames, uint8 `h w 3`, whole."""
        return read_frames(self.lq, count=self.frames)


@dataclass(frozen=True)
class TestSet:
    """All clips of a folder, their common scale, and what prepare.json says about them (or nothing)."""

    __test__ = False  # the name is no test class

    name: str
    folder: Path
    layout: str  # where LQ and GT were found
    clips: tuple[Clip, ...]
    scale: int
    prepared: dict[str, Any]

    @property
    def has_gt(self) -> bool:
        return all(clip.gt is not None for clip in self.clips)


def window(frame: np.ndarray, height: int, width: int, align: str) -> np.ndarray:
    """The part of a frame `H W 3` that is scored: the top left `height` x `width`, or with "center" the
    middle."""
    top = left = 0
    if align == "center":
        top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return frame[top : top + height, left : left + width]


def parse_set(text: str, frames: int | None = None, align: str = "refuse") -> TestSet:
    """Open what `--data` names: `DIR` or `NAME=DIR,setting=value...`; UserError says the valid forms."""
    place, *assignments = text.split(",")
    name, equals, folder = place.partition("=")
    if not equals or Path(place).is_dir():
        name, folder = Path(place).resolve().name, place
    if not folder or not re.fullmatch(r"[\w.+ -]+", name):
        raise UserError(f"cannot read --data {text!r}; valid forms: {FORMS}")
    settings = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if key not in ("gt", "lq", "scale", "clips") or not value:
            raise UserError(f"--data {text!r}: {assignment!r} is no setting; valid forms: {FORMS}")
        settings[key] = value
    scale = settings.pop("scale", None)
    if scale is not None and (not scale.isdecimal() or int(scale) < 1):
        raise UserError(f"--data {text!r}: scale must be a whole number of at least 1")
    clips = settings.pop("clips", None)
    return open_test_set(
        folder,
        frames,
        name=name,
        align=align,
        scale=None if scale is None else int(scale),
        clips=None if clips is None else tuple(clips.split("+")),
        **settings,
    )


def open_test_set(
    folder: str | Path,
    frames: int | None = None,
    *,
    name: str = "",
    align: str = "refuse",
    scale: int | None = None,
    clips: tuple[str, ...] | None = None,
    gt: str | None = None,
    lq: str | None = None,
) -> TestSet:
    """Find the clips under `folder` and check counts and sizes; `frames` keeps the first so many of each.

    Raises UserError when there is no clip, a clip has no partner, LQ and GT differ in their number of frames
    or the sizes are not one whole factor apart (unless `align` says what to cut), a clip has fewer than
    `frames`, or scales differ. `scale` is for sets without GT (default 4); with GT it must be the one found.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    if align not in ALIGN:
        raise UserError(f"--align {align!r} must be one of {', '.join(ALIGN)}")
    found, truths, layout = _find_sides(folder, gt, lq)
    found, truths = _chosen(folder, name, clips, found, truths)
    made, scales = [], {}
    for clip_name, path in found.items():
        clip, factor = _measured(clip_name, path, truths.get(clip_name), align, scale)
        if frames is not None and clip.frames < frames:
            raise UserError(f"clip {clip_name!r} has only {clip.frames} frames, not {frames}; lower --frames")
        made.append(replace(clip, frames=frames or clip.frames))
        scales.setdefault(factor, clip_name)
    if len(scales) > 1:
        texts = ", ".join(f"x{factor} ({clip})" for factor, clip in scales.items())
        raise UserError(f"{folder} mixes scales: {texts}; evaluate them one at a time (clips=...)")
    prepared = folder / "prepare.json"
    record = read_json(prepared) if prepared.exists() else {}
    return TestSet(name, folder, layout, tuple(made), next(iter(scales)), record)


def _find_sides(folder: Path, gt: str | None, lq: str | None) -> tuple[dict[str, Path], dict[str, Path], str]:
    """LQ and GT clips by name, and in words where they were."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; give a folder of clips, or make a test set with "
            f"`python -m eval prepare SRC {folder}`"
        )
    truth, low = _side(folder, "gt", gt), _side(folder, "lq", lq)
    if truth is not None or low is not None:
        if low is None:
            wanted = ", ".join(SIDES["lq"][0][:4])
            raise UserError(f"{folder} has GT in {truth.name} but no LQ; name its folder {wanted}..., or lq=")
        truths = {} if truth is None else _by_name(truth)
        found = _by_name(low)
        if truths:
            _same_names(folder, truths, found)
        places = [f"LQ in {low.relative_to(folder)}"]
        places += ["no GT"] if truth is None else [f"GT in {truth.relative_to(folder)}"]
        return found, truths, ", ".join(places)
    inside = [d for d in sorted(folder.iterdir()) if d.is_dir() and _side(d, "lq", None) is not None]
    if inside:
        lows = {d.name: _side(d, "lq", None) for d in inside}
        truths = {d.name: side for d in inside if (side := _side(d, "gt", None)) is not None}
        if truths:
            _same_names(folder, truths, lows)
        sides = sorted({side.name for side in (*lows.values(), *truths.values())})
        return lows, truths, f"in each clip's folder: {', '.join(sides)}"
    return _by_name(folder), {}, "clips without GT"


def _side(folder: Path, side: str, wanted: str | None) -> Path | None:
    """The folder of one side, as asked for or by its usual names."""
    if wanted is not None:
        if not (folder / wanted).is_dir():
            raise UserError(f"{folder} has no folder {wanted} ({side}={wanted})")
        return folder / wanted
    here = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    for names in SIDES[side]:
        there = []
        for name in names:
            top, _, rest = name.partition("/")
            path = here.get(top.lower())
            if path is not None and (path / rest).is_dir():
                there.append(path / rest)
        if len(there) > 1:
            texts = ", ".join(str(path.relative_to(folder)) for path in there)
            raise UserError(
                f"{folder} has several {side.upper()} folders: {texts}; choose with {side}=FOLDER"
            )
        if there:
            return there[0]
    return None


def _same_names(folder: Path, truths: dict[str, Path], found: dict[str, Path]) -> None:
    alone = sorted(truths.keys() ^ found.keys())
    if alone:
        side = "GT" if alone[0] in truths else "LQ"
        more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
        raise UserError(
            f"{folder}: clip {alone[0]!r}{more} is only under {side}; every clip needs both GT and LQ"
        )


def _by_name(folder: Path) -> dict[str, Path]:
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


def _chosen(
    folder: Path,
    name: str,
    wanted: tuple[str, ...] | None,
    found: dict[str, Path],
    truths: dict[str, Path],
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Only the clips asked for, in natural order of the folder."""
    usual = SUBSETS.get(name.upper(), ())
    if wanted is None and not (usual and set(usual) <= set(found)):
        return found, truths
    wanted = wanted or usual
    for clip in wanted:
        if clip not in found:
            raise UserError(f"{folder} has no clip {clip!r}, one of those wanted for {name}")
    return {k: v for k, v in found.items() if k in wanted}, {k: v for k, v in truths.items() if k in wanted}


def _measured(name: str, lq: Path, gt: Path | None, align: str, scale: int | None) -> tuple[Clip, int]:
    """A clip and its scale; `align` says what may be cut so that the sides fit."""
    count, low_height, low_width = measure_clip(lq)
    if gt is None:
        factor = scale or 4
        return Clip(name, lq, None, count, count, factor * low_height, factor * low_width, align), factor
    total, height, width = measure_clip(gt)
    if total != count and align == "refuse":
        raise UserError(
            f"clip {name!r} has {count} LQ frames but {total} GT frames; they must be the same "
            f"(--align first takes those both have)"
        )
    factor = scale or max(1, round(height / low_height))
    if (height, width) != (factor * low_height, factor * low_width) and align in ("refuse", "first"):
        sizes = f"{width}x{height} in GT and {low_width}x{low_height} in LQ"
        raise UserError(
            f"clip {name!r} is {sizes}; GT must be {'a whole multiple of' if scale is None else f'x{scale}'} "
            f"LQ (--align top-left or center cuts to what both have)"
        )
    frames = min(count, total)
    size = min(height, factor * low_height), min(width, factor * low_width)
    notes = [f"first {frames} frames of {count} LQ and {total} GT"] if count != total else []
    if size != (height, width):
        notes.append(f"GT {width}x{height} cut to {size[1]}x{size[0]}, {align}")
    return Clip(name, lq, gt, frames, frames, *size, align, "; ".join(notes)), factor


def measure_clip(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a clip; a container that does not tell its frames is decoded once."""
    info = probe(path)
    frames = info.frames if info.frames is not None else sum(1 for _ in read_frames(path))
    return frames, info.height, info.width
