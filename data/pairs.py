"""Own pairs of HR and LR clips in folders: nothing is degraded.

`DIR/HR` and `DIR/LR` hold videos, folders of frames or images under the same names (`HR/a/b.mp4` belongs to
`LR/a/b.mkv`); `DIR/val/HR` and `DIR/val/LR` those to hold out, without which every eighth clip is.
"""

import hashlib
from pathlib import Path

import numpy as np

from data.reader import Damaged
from data.shards import Sample
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.demux import opened
from flashvsr.base.stills import is_image
from flashvsr.base.video_io import list_clips, probe, read_frames

HOLD_OUT = 8


def is_pairs(location: str) -> bool:
    """Whether this is a folder of pairs."""
    return all((Path(location) / side).is_dir() for side in ("HR", "LR"))


class Pairs:
    """Clips whose LR frames are given; reads both sides. Raises UserError for clips that do not fit."""

    def __init__(self, folder: str | Path, scale: int, quiet: bool = False) -> None:
        self.folder, self.scale, self.name = Path(folder), scale, str(folder)
        self._paths: dict[str, tuple[Path, Path]] = {}
        train = self._find(self.folder, quiet)
        if (self.folder / "val").is_dir():
            self.splits = {"train": train, "val": self._find(self.folder / "val", quiet)}
            return
        if len(train) == 1:
            raise UserError(f"'{folder}' holds one pair and one must be held out: give two or more")
        order = sorted(train, key=lambda sample: hashlib.sha256(sample.key.encode()).digest())
        held = {sample.key for sample in order[::HOLD_OUT]}
        self.splits = {
            "train": tuple(s for s in train if s.key not in held),
            "val": tuple(s for s in train if s.key in held),
        }

    def _find(self, folder: Path, quiet: bool) -> tuple[Sample, ...]:
        sides = [{_key(path, folder / side): path for path in _clips(folder / side)} for side in ("HR", "LR")]
        for key in sorted(sides[0].keys() ^ sides[1].keys()):
            there, missing = ("HR", "LR") if key in sides[0] else ("LR", "HR")
            raise UserError(
                f"'{folder / there / key}' has no partner in '{folder / missing}': add or remove it"
            )
        samples = []
        with Progress(len(sides[0]), "reading pairs", unit="pair", quiet=quiet) as progress:
            for key in sorted(sides[0]):
                pair = sides[0][key], sides[1][key]
                name = str((folder / key).relative_to(self.folder))
                samples.append(self._sample(name, *pair))
                self._paths[name] = pair
                progress.update()
        return tuple(samples)

    def _sample(self, key: str, hr: Path, lr: Path) -> Sample:
        (frames, height, width, fps), (count, h, w, _) = _facts(hr), _facts(lr)
        if (h * self.scale, w * self.scale) != (height, width):
            raise UserError(
                f"pair '{key}': HR is {width}x{height}, LR {w}x{h}; they must be exactly "
                f"scale={self.scale} apart"
            )
        if count != frames:
            raise UserError(f"pair '{key}': HR has {frames} frames, LR {count}; they must have as many")
        kind = "frames" if hr.is_dir() else "image" if is_image(hr) else "video"
        stamp = hashlib.sha256(repr([_stamps(hr), _stamps(lr)]).encode()).hexdigest()
        return Sample(
            key=key, shard="", offset=0, size=0, kind=kind, frames=frames, fps=fps,
            height=height, width=width, sha256=stamp, source=hr.name,
        )  # fmt: skip

    def frames(
        self, sample: Sample, start: int, count: int, size: None, crop: tuple[int, ...], stride: int = 1
    ) -> np.ndarray:
        """HR frames start, start + stride, … of a clip, cut: uint8 `F H W 3`. Raises Damaged."""
        return self._read(sample, 0, start, count, crop, stride)

    def lr_frames(
        self, sample: Sample, start: int, count: int, crop: tuple[int, ...], stride: int = 1
    ) -> np.ndarray:
        """The LR frames of the same part; `crop` is in HR pixels, multiples of `scale`."""
        return self._read(sample, 1, start, count, tuple(value // self.scale for value in crop), stride)

    def _read(self, sample: Sample, side: int, start: int, count: int, crop, stride: int) -> np.ndarray:
        path = self._paths[sample.key][side]
        try:
            frames = list(read_frames(path, start, count, stride, crop=crop))
        except Exception as error:  # decoders raise whatever they like over what they cannot understand
            raise Damaged(f"'{path}' cannot be decoded ({error})") from error
        if len(frames) != count or any(frame.shape != (*crop[2:], 3) for frame in frames):
            raise Damaged(f"'{path}' gave {len(frames)} of {count} frames from {start} on")
        return np.stack(frames)


def _clips(folder: Path) -> list[Path]:
    found = list_clips(folder)
    if not found:
        raise UserError(f"no video or image in '{folder}': pairs are clips of the same names in HR and LR")
    return found


def _key(path: Path, side: Path) -> str:
    inside = path.relative_to(side)
    return str(inside if path.is_dir() else inside.with_suffix(""))


def _facts(path: Path) -> tuple[int, int, int, float]:
    """Frames, height, width, frames per second."""
    info = probe(path)
    frames = info.frames
    if frames is None:  # the container does not say: count packets
        with opened(path) as (container, stream):
            frames = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    return frames, info.height, info.width, float(info.fps)


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
