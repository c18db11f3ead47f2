"""Reading and writing pictures over time: video files, folders of frames, single images.

A frame is uint8 [H, W, 3] RGB, upright. Untagged colour is read as FFmpeg does (BT.601); what is written is
tagged BT.709, limited range.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.demux import Keyframes, numbered, opened
from flashvsr.base.files import atomic, atomic_dir
from flashvsr.base.pixels import Box, ToRGB, cut
from flashvsr.base.stills import (
    FRAME_NAME,
    Source,
    frames_of,
    is_frame_folder,
    is_image,
    is_picture,
    name_of,
    natural,
    read_image,
)

VIDEO_SUFFIXES = frozenset(
    (
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".ts",
        ".mts",
        ".mpg",
        ".mpeg",
        ".flv",
        ".wmv",
        ".gif",
        ".y4m",
    )
)
STILL_FPS = Fraction(25)  # images and folders of frames know no frame rate


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


def is_video(path: str | Path) -> bool:
    """Whether the name is that of a video file."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


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


class VideoWriter:
    """Write frames to a video file, or to a folder of PNG frames (frame-000000.png, ...) when the path ends
    in "/" or has no suffix.

    Use as a context manager: the file appears whole when the block ends, and not at all when it raises.
    Pixels are 4:2:0, or 4:4:4 when a side is odd (never padded). `lossless` writes RGB exactly (libx264rgb
    for libx264, else ffv1; for .mp4, .mov or .mkv). A folder is replaced only when it holds nothing but such
    frames. UserError for what FFmpeg cannot write, and when no frame came.
    """

    def __init__(
        self,
        path: str | Path,
        fps: Fraction | float,
        height: int,
        width: int,
        codec: str = "libx264",
        crf: float = 15,
        lossless: bool = False,
    ) -> None:
        self.as_folder = str(path).endswith("/") or not Path(path).suffix
        self.path, self.fps = Path(path), Fraction(fps).limit_denominator(100_000)
        self.height, self.width = height, width
        self.codec, self.crf, self.lossless = codec, crf, lossless
        self.frames = 0
        if self.fps <= 0 or height < 1 or width < 1:
            raise UserError(f"{path}: cannot write {width}x{height} frames at {fps} per second")
        if not self.as_folder and not is_video(self.path):
            raise UserError(
                f"{path}: unknown video suffix {self.path.suffix!r}; use .mp4, or a folder for PNG frames"
            )

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            if self.as_folder:
                ours = self.path.is_dir() and all(FRAME_NAME.fullmatch(p.name) for p in self.path.iterdir())
                self._part = stack.enter_context(atomic_dir(self.path, replace=ours))
            else:
                self._part = stack.enter_context(atomic(self.path))
                self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        import av

        mp4 = self.path.suffix.lower() in (".mp4", ".m4v", ".mov")
        options = {"movflags": "+faststart"} if mp4 else {}
        with self._explained():
            self._container = stack.enter_context(av.open(str(self._part), "w", container_options=options))
            self._stream = self._container.add_stream(self._codec_name(), rate=self.fps)
        stream = self._stream
        stream.height, stream.width = self.height, self.width
        if self.lossless:
            stream.pix_fmt = "rgb24" if stream.codec_context.name == "libx264rgb" else "bgr0"
            stream.options = {"qp": "0"}
            return
        stream.pix_fmt = "yuv444p" if self.height % 2 or self.width % 2 else "yuv420p"
        stream.options = {"crf": str(self.crf)}
        if stream.codec_context.name == "libx264":
            # with macroblock trees x264 gives other bits from run to run on AVX-512 machines
            stream.options |= {"x264-params": "mbtree=0"}
        context = stream.codec_context
        context.colorspace, context.color_range = 1, 1  # BT.709, limited range
        context.color_primaries = context.color_trc = 1

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What FFmpeg refuses (a codec the file type cannot hold, a full disk) as one sentence."""
        import av

        try:
            yield
        except (av.error.FFmpegError, ValueError) as error:  # an unknown codec is a ValueError
            reason = getattr(error, "strerror", None) or str(error)
            what = f"{self._codec_name()} at {self.width}x{self.height}"
            raise UserError(
                f"{self.path}: writing {what} failed ({reason}); libx264 in .mp4 works"
            ) from error

    def _codec_name(self) -> str:
        if not self.lossless:
            return self.codec
        return "libx264rgb" if self.codec == "libx264" else "ffv1"

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 RGB frames [F, H, W, 3]."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            expected = f"uint8 [F, {self.height}, {self.width}, 3]"
            raise ValueError(f"{self.path}: frames are {frames.dtype} {list(frames.shape)}, not {expected}")
        for frame in frames:
            if self.as_folder:
                from PIL import Image

                Image.fromarray(frame).save(self._part / f"frame-{self.frames:06d}.png", compress_level=3)
            else:
                self._encode(np.ascontiguousarray(frame))
            self.frames += 1

    def _encode(self, pixels: np.ndarray) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if not self.lossless:
            flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
            frame = frame.reformat(
                format=self._stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=flags | Interpolation.BITEXACT,
            )
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        with self._explained():
            self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if not self.frames:
                raise UserError(f"{self.path}: no frames came, so nothing is written; check the input")
            if not self.as_folder:
                with self._explained():
                    self._container.mux(self._stream.encode())
                    self._container.close()
