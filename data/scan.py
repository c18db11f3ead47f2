"""One source, from beginning to end: is it whole, what is in it, where are its scenes.

Runs in a worker process. Every frame is decoded once; what cannot be decoded, changes its size or is flagged
as damaged is refused with a reason, so that a loader never meets it.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data import remux
from data.scenes import SIZE, CutDetector, ranges
from data.workers import Beat
from flashvsr.base.cli import UserError
from flashvsr.base.demux import frame_times, keyframes_of, numbered, opened
from flashvsr.base.stills import Source, frames_of, is_image, read_image
from flashvsr.base.video_io import STILL_FPS


@dataclass(frozen=True)
class Options:
    """How sources become members and clips."""

    cuts: bool = True  # clips end at scene changes
    max_seconds: float = 20.0  # longer scenes become several clips of equal length
    min_frames: int = 5  # shorter clips are left out; 5 frames are one latent
    member_mb: int = 256  # larger videos are cut at keyframes into files of about this size
    codec: str | None = None  # every clip is encoded anew with it
    crf: float = 12.0

    def __post_init__(self) -> None:
        if self.max_seconds <= 0 or self.min_frames < 1 or self.member_mb < 1:
            raise UserError(
                f"max_seconds={self.max_seconds:g}, min_frames={self.min_frames}, member_mb={self.member_mb} "
                "must be above 0"
            )


@dataclass
class Seen:
    """What decoding a clip showed."""

    height: int  # upright
    width: int
    fps: float
    shown: tuple[Any, ...] = ()  # how decoded pictures become upright RGB: size, rotation, format, colours
    frames: int = 0
    times: list[int | None] = field(default_factory=list)  # time stamps of the frames
    marks: list[int] = field(default_factory=list)  # a checksum of every frame's small grey picture
    detector: CutDetector = field(default_factory=CutDetector)

    def add(self, grey: np.ndarray, time: int | None) -> None:
        self.frames += 1
        self.times.append(time)
        self.marks.append(_mark(grey))
        self.detector.push(grey)

    def clips(self, options: Options, edges: tuple[int, ...] = ()) -> list[tuple[int, int]]:
        """Clips (start, frames); UserError when none is long enough."""
        cuts = self.detector.cuts() if options.cuts else []
        most = max(round(options.max_seconds * self.fps), options.min_frames)
        clips = ranges(self.frames, cuts, most, options.min_frames, edges)
        if not clips:
            scenes = f" in {len(cuts) + 1} scenes" if cuts else ""
            raise UserError(f"has {self.frames} frame(s){scenes}; a clip needs {options.min_frames}")
        return clips


def _mark(grey: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(grey))


class _Grey:
    """Decoded frames to small grey pictures, uint8 `SIZE`."""

    def __init__(self) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self.reformatter = VideoReformatter()
        self.flags = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def __call__(self, frame: Any) -> np.ndarray:
        how = {"interpolation": self.flags, "threads": 1}
        return self.reformatter.reformat(frame, SIZE[1], SIZE[0], "gray", **how).to_ndarray()


def decode(source: Source, beat: Beat) -> Seen:
    """Decodes all of a video. Raises UserError where it is damaged."""
    grey, seen, shape = _Grey(), None, None
    with opened(source) as (container, stream):
        stream.codec_context.thread_count = 1  # the other cores have files of their own
        for frame in container.decode(stream):
            if seen is None:
                turned = frame.rotation % 180 != 0
                height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
                rate = stream.average_rate or stream.guessed_rate or STILL_FPS
                seen, shape = Seen(height, width, round(float(rate), 6)), (frame.height, frame.width)
                colours = (frame.format.name, int(frame.colorspace), int(frame.color_range))
                seen.shown = (*shape, frame.rotation, *colours)
            if (frame.height, frame.width) != shape:
                now = f"{frame.width}x{frame.height} at frame {seen.frames}"
                raise UserError(f"changes from {shape[1]}x{shape[0]} to {now}")
            if frame.is_corrupt:
                raise UserError(f"has a damaged picture at frame {seen.frames}")
            seen.add(grey(frame), frame.pts)
            beat()
    if seen is None:
        raise UserError("holds no frame that can be decoded")
    return seen


def entries(source: Source, seen: Seen, beat: Beat) -> tuple[tuple[int, int], ...]:
    """The keyframes by which the video can be entered, none where that would give other pictures.

    Believed when the packets tell the same time stamps as the decoded frames, and entering at the middle one
    gives the frame that decoding from the beginning gave.
    """
    times = frame_times(source, each=beat)
    if times is None or [time for time, _ in times] != seen.times:
        return ()
    keyframes = keyframes_of(times)
    if len(keyframes) == 1:
        return keyframes
    middle = keyframes[len(keyframes) // 2]
    number, frame = next(numbered(source, middle[0], False, keyframes))
    same = number == middle[0] and _mark(_Grey()(frame)) == seen.marks[number]
    return keyframes if same else ()


def look_at_pictures(pictures: Iterable[Source], beat: Beat) -> Seen:
    """The frames of a folder, or one image. Raises UserError where one cannot be read or has another size."""
    from PIL import Image

    seen = None
    for picture in pictures:
        pixels = read_image(picture)
        seen = seen or Seen(*pixels.shape[:2], float(STILL_FPS))
        if pixels.shape[:2] != (seen.height, seen.width):
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise UserError(f"changes from {seen.width}x{seen.height} to {size} at frame {seen.frames}")
        grey = Image.fromarray(pixels).convert("L").resize(SIZE[::-1], Image.Resampling.BOX)
        seen.add(np.asarray(grey), None)
        beat()
    return seen


def digest(files: Iterable[Path], beat: Beat) -> str:
    """SHA-256 of the bytes of all files, in order."""
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while chunk := f.read(1 << 20):
                sha.update(chunk)
                beat()
    return sha.hexdigest()


def scan(path: str, folder: str, stem: str, options: dict[str, Any], beat: Beat) -> dict[str, Any]:
    """What `data.build` needs to know of a source: `{sha256, members}`, each member the fields of
    `data.shards.Member` but for key and source.

    Files that have to be made (pieces of a long video, clips encoded anew) go to `folder`, named after
    `stem`. Raises UserError with the reason when the source cannot be used.
    """
    source, wanted = Path(path), Options(**options)
    kind = "frames" if source.is_dir() else "image" if is_image(source) else "video"
    files = frames_of(source) if kind == "frames" else [source]
    seen = decode(source, beat) if kind == "video" else look_at_pictures(files, beat)
    whole = _member(kind, files, seen, ((0, 1),) if kind == "image" else tuple(seen.clips(wanted)), beat)
    if kind == "video":
        whole["keyframes"] = entries(source, seen, beat)
    members = [whole]
    if wanted.codec and kind != "image":
        members = []
        for n, (start, count) in enumerate(whole["clips"]):
            file = Path(folder) / f"{stem}-{n:04d}.mp4"
            remux.encode(source, file, start, count, seen.fps, wanted.codec, wanted.crf, beat)
            members.append(_made(file, decode(file, beat), ((0, count),), beat))
    elif kind == "video" and whole["size"] > wanted.member_mb << 20 and whole["keyframes"]:
        members = _pieces(source, Path(folder), stem, wanted, seen, beat) or members
    return {"sha256": whole["sha256"], "members": members}


def _member(kind: str, files: list[Path], seen: Seen, clips: tuple, beat: Beat) -> dict[str, Any]:
    return {
        "kind": kind,
        "files": [str(file) for file in files],
        "size": sum(file.stat().st_size for file in files),
        "frames": seen.frames,
        "fps": seen.fps,
        "height": seen.height,
        "width": seen.width,
        "sha256": digest(files, beat),
        "clips": clips,
        "keyframes": (),
    }


def _made(file: Path, seen: Seen, clips: tuple, beat: Beat) -> dict[str, Any]:
    return _member("video", [file], seen, clips, beat) | {"keyframes": entries(file, seen, beat)}


def _pieces(
    source: Path, folder: Path, stem: str, options: Options, seen: Seen, beat: Beat
) -> list[dict[str, Any]]:
    """The video as several files, its packets as they were; none when their frames are not the very same."""
    pieces = remux.split(source, folder, stem, options.member_mb << 20, beat)
    edges = tuple(first for first, _ in pieces)
    members, at = [], 0
    for first, file in pieces:
        part = decode(file, beat)
        same = part.marks == seen.marks[first : first + part.frames] and part.shown == seen.shown
        if first != at or not same:
            break
        at += part.frames
        inside = [(a - first, n) for a, n in seen.clips(options, edges) if first <= a < at]
        if inside:
            part.fps = seen.fps
            members.append(_made(file, part, tuple(inside), beat))
    if at == seen.frames:
        return members
    for _, file in pieces:
        file.unlink()
    return []


def scan_member(
    shard: str,
    kind: str,
    places: list[tuple[int, int]],
    facts: tuple[int, int] | None,
    options: dict[str, Any],
    beat: Beat,
) -> dict[str, Any]:
    """The same for a member that already lies in a tar, its files at (offset, size) and its JSON, if any, at
    `facts`: `{frames, fps, height, width, sha256, clips, keyframes}`, and `source` where the JSON has it."""
    wanted = Options(**options)
    with open(shard, "rb") as file:
        files = [_part(file, *place) for place in places]
        written = _ours(_part(file, *facts)) if facts else None
    sha = hashlib.sha256(b"".join(files)).hexdigest()
    if written is not None:
        if written["sha256"] != sha:
            raise UserError("is damaged: its hash is not that of its JSON")
        return written
    seen = decode(files[0], beat) if kind == "video" else look_at_pictures(files, beat)
    clips = [(0, 1)] if kind == "image" else seen.clips(wanted)
    found = {"frames": seen.frames, "fps": seen.fps, "height": seen.height, "width": seen.width}
    keyframes = entries(files[0], seen, beat) if kind == "video" else ()
    return {**found, "sha256": sha, "clips": clips, "keyframes": keyframes}


def _ours(text: bytes) -> dict[str, Any] | None:
    """The facts that `data.shards.write_shard` left in a member's JSON; None for JSON of someone else."""
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    names = ("frames", "fps", "height", "width", "source", "sha256", "clips", "keyframes")
    return facts if isinstance(facts, dict) and all(name in facts for name in names) else None


def _part(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
