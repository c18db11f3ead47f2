"""Reading and writing pictures over time: video files, folders of frames, single images.

A frame is uint8 [H, W, 3] RGB, upright. Untagged colour is read as FFmpeg does (BT.601); what is written is
tagged BT.709, limited range.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.demux import Keyframes, numbered, opened
from flashvsr.base.footage import STILL_FPS
from flashvsr.base.pixels import Box, ToRGB, cut
from flashvsr.base.stills import (
    VIDEO_SUFFIXES,
    Source,
    frames_of,
    is_frame_folder,
    is_image,
    is_picture,
    is_video,
    name_of,
    natural,
    read_image,
)
from flashvsr.base.video_writer import VideoWriter

__all__ = (
    "STILL_FPS", "VIDEO_SUFFIXES", "VideoInfo", "VideoWriter", "is_image", "is_video", "list_clips", "probe",
    "read_frames",
)  # fmt: skip


@dataclass(frozen=True)
class VideoInfo:
    """What the container says. Height and width are those of upright frames; `rotation` (degrees
    counter-clockwise) is already applied to them. `frames` and `duration` (seconds) are None when unknown."""

    frames: int | None
    fps: Fraction
    height: int
    width: int
    rotation: int
    has_audio: bool
    duration: float | None


def list_clips(folder: str | Path, unreadable: list[tuple[str, str]] | None = None) -> list[Path]:
    """All clips under a folder, in natural order: video files, single images, folders of frames.

    A folder of numbered images of one size is one clip; images of several sizes are a clip each. Hidden
    files are passed over. A file is its own list. Links are followed, in circles once. UserError when the
    path does not exist. A folder that may not be read raises OSError, or goes to `unreadable` as (name,
    reason).
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist; check the path")
    if folder.is_file():
        return [folder] if is_video(folder) or is_image(folder) else []
    return _list_folder(folder, frozenset(), unreadable)


def _list_folder(
    folder: Path, above: frozenset[Path], unreadable: list[tuple[str, str]] | None
) -> list[Path]:
    real = folder.resolve()
    if real in above:
        return []
    try:
        items = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=natural)
        if is_frame_folder(folder) and not any(p.is_dir() or is_video(p) for p in items):
            return [folder]
    except OSError as error:
        if unreadable is None:
            raise
        unreadable.append((folder.name, f"the folder cannot be read ({error.strerror})"))
        return []
    clips: list[Path] = []
    for item in items:
        if item.is_dir():
            clips += _list_folder(item, above | {real}, unreadable)
        elif item.is_file() and (is_video(item) or is_image(item)):
            clips.append(item)
    return clips


def probe(path: Source) -> VideoInfo:
    """Size, rate and length of a video, a folder of frames or an image; decodes one frame.

    UserError when it cannot be read.
    """
    if is_picture(path) or _is_folder(path):
        files = [path] if is_picture(path) else frames_of(Path(path))
        height, width = read_image(files[0]).shape[:2]
        return VideoInfo(len(files), STILL_FPS, height, width, 0, False, len(files) / float(STILL_FPS))
    with opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError(f"{name_of(path)} holds no decodable frame; replace or leave out the file")
        height, width = frame.height, frame.width
        if frame.rotation % 180:
            height, width = width, height
        return VideoInfo(
            frames=stream.frames or None,
            fps=Fraction(stream.average_rate or stream.guessed_rate or STILL_FPS),
            height=height,
            width=width,
            rotation=frame.rotation,
            has_audio=bool(container.streams.audio),
            duration=container.duration / 1e6 if container.duration else None,
        )


def read_frames(
    path: Source,
    start: int = 0,
    count: int | None = None,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    keyframes: Keyframes = (),
    crop: Box | None = None,
) -> Iterator[np.ndarray]:
    """Frames start, start + stride, ... (`count` of them, or to the end) as uint8 [H, W, 3] RGB, upright.

    Frames are counted as they are shown; a variable rate neither repeats nor drops any. `size` = (h, w)
    resizes (bicubic, antialiased) on the way, `crop` (top, left, height, width) then cuts: only that part of
    a large frame is converted. Takes a path, or a video's or image's bytes, or a binary file object. Fewer
    frames come when the source ends earlier. `keyframes` of a video, from
    `flashvsr.base.demux.keyframes_of`, spare a pass over its packets before a seek. UserError, naming the
    file, when it cannot be read, at the latest at the frame concerned.
    """
    if start < 0 or stride < 1 or (count is not None and count < 0):
        raise ValueError(
            f"start={start}, count={count}, stride={stride}: expected start, count >= 0, stride >= 1"
        )
    size = None if size is None else (int(size[0]), int(size[1]))
    stop = None if count is None else start + count * stride
    if is_picture(path):
        images = (read_image(path, size) for _ in itertools.islice(range(1), start, stop, stride))
    elif _is_folder(path):
        images = _read_folder(Path(path), start, stop, stride, size)
    else:
        return _read_video(path, start, stop, stride, ToRGB(size, crop), keyframes)
    return images if crop is None else (cut(image, crop) for image in images)


def _is_folder(source: Source) -> bool:
    return isinstance(source, (str, Path)) and Path(source).is_dir()


def _read_folder(
    folder: Path, start: int, stop: int | None, stride: int, size: tuple[int, int] | None
) -> Iterator[np.ndarray]:
    files = frames_of(folder)
    shape = None
    for path in files[start:stop:stride]:
        frame = read_image(path, size)
        if shape not in (None, frame.shape):
            raise UserError(
                f"{path} is {frame.shape[1]}x{frame.shape[0]}, unlike the frames before it; resize it"
            )
        shape = frame.shape
        yield frame


def _read_video(
    source: Source, start: int, stop: int | None, stride: int, to_rgb: ToRGB, keyframes: Keyframes
) -> Iterator[np.ndarray]:
    """Decode in presentation order, beginning at the keyframe before `start` where that is exact."""
    for k, frame in numbered(source, start, stop is None, keyframes):
        if stop is not None and k >= stop:
            break
        if k >= start and not (k - start) % stride:
            yield to_rgb(frame)
