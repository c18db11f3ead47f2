"""What is upscaled: a clip's frames and their times, from a video, a folder of frames, an image or a pipe.

Unlike `read_frames`, which stops at damage, this reads what can be read and says afterwards what is missing.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.demux import frame_times, numbered, opened
from flashvsr.base.pixels import ToRGB
from flashvsr.base.stills import frames_of, is_image, name_of, read_image

STILL_FPS = Fraction(25)  # images and folders of frames know no frame rate
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
_MATRICES = (1, 4, 5, 6, 7, 9)  # those swscale converts to


@dataclass(frozen=True)
class Color:
    """How a file's Y'CbCr is to be read, in the numbers of ITU-T H.273; range 1 is limited, 2 full."""

    matrix: int = 1
    range: int = 1
    primaries: int = 1
    transfer: int = 1


BT709 = Color()


@dataclass(frozen=True)
class Moment:
    """A place in a clip: a frame's number, or seconds after its first frame."""

    value: Fraction
    in_frames: bool

    @classmethod
    def parse(cls, text: str) -> Moment:
        """`12.5`, `1:02:03.5` (seconds) or `300f` (frames); ValueError for anything else."""
        if re.fullmatch(r"\d+f", text):
            return cls(Fraction(text[:-1]), True)
        if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
            raise ValueError(f"{text!r} is no time; write seconds (12.5), h:mm:ss or frames (300f)")
        seconds = Fraction(0)
        for part in text.split(":"):
            seconds = 60 * seconds + Fraction(part)
        return cls(seconds, False)


class Footage:
    """One clip from `start` up to `end`, opened at its first frame. Use as a context manager, iterate once.

    Gives uint8 `H W 3` RGB frames, upright; `clock` receives (time stamp, duration) of each in `time_base`,
    for whoever writes them. `raw` = (height, width) reads a pipe of RGB frames. `fps` is for what knows no
    rate. After the last frame `missing` says in words what could not be read. UserError for what holds no
    frame, for HDR (PQ, HLG) and for a transparent first frame.
    """

    def __init__(
        self,
        source: str | Path | BinaryIO,
        start: Moment | None = None,
        end: Moment | None = None,
        *,
        fps: Fraction | None = None,
        raw: tuple[int, int] | None = None,
    ) -> None:
        self.source, self.name = source, name_of(source)
        self.start, self.end = start, end
        self.fps, self.time_base = fps or STILL_FPS, 1 / (fps or STILL_FPS)
        self.frames: int | None = None  # as announced
        self.color, self.aspect, self.is_video = BT709, None, False
        self.clock: deque[tuple[int, int]] = deque()
        self.missing: str | None = None
        self.taken, self.shift = 0, 0  # frames so far; what is taken off their time stamps
        self.ended = Fraction(0)  # where the last frame ends, in seconds on the source's clock
        self._last: int | None = None
        self._items = self._open(raw)
        first = next(self._items, None)
        if first is None:
            where = "" if start is None else " there; --start lies behind its end"
            raise UserError(self.missing or f"{self.name} holds no frame{where}")
        self.height, self.width = first[2].shape[:2]
        self.first_time = first[0] * self.time_base
        self._items = itertools.chain([first], self._items)

    def __enter__(self) -> Footage:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        for pts, duration, pixels in self._items:
            self.clock.append((pts - self.shift, duration))
            self.ended = (pts + duration) * self.time_base
            yield pixels

    def _open(self, raw: tuple[int, int] | None) -> Iterator[tuple[int, int, np.ndarray]]:
        source = self.source
        if hasattr(source, "read"):
            pixels = self._raw(raw) if raw else None
        elif is_image(source):
            pixels, self.frames = self._images([Path(source)]), 1
        elif Path(source).is_dir():
            files = frames_of(Path(source))
            pixels, self.frames = self._images(files), len(files)
        else:
            pixels = None
        if pixels is None:
            self._decoder = self._video()
            return self._decoder
        self._decoder = self._numbered(pixels)
        self.frames = None if self.frames is None else self._within(self.frames)
        return self._decoder

    # ---- what has no times of its own ----------------------------------------------------------------------

    def _numbered(self, pixels: Iterator[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
        first, last = self._as_frames(self.start, 0), self._as_frames(self.end, None)
        for k, image in enumerate(itertools.islice(pixels, first, last)):
            self.taken += 1
            yield first + k, 1, image

    def _as_frames(self, moment: Moment | None, default: int | None) -> int | None:
        if moment is None:
            return default
        return int(moment.value) if moment.in_frames else -int(-moment.value * self.fps // 1)

    def _within(self, count: int) -> int:
        first, last = self._as_frames(self.start, 0), self._as_frames(self.end, None)
        return max(0, (count if last is None else min(last, count)) - first)

    def _images(self, files: list[Path]) -> Iterator[np.ndarray]:
        _refuse_transparent_image(files[0])
        shape = None
        for path in files:
            try:
                image = read_image(path)
                if shape not in (None, image.shape):
                    raise UserError(f"{path} is {image.shape[1]}x{image.shape[0]}, unlike those before it")
            except UserError as error:
                self.missing = str(error)
                return
            shape = image.shape
            yield image

    def _raw(self, size: tuple[int, int]) -> Iterator[np.ndarray]:
        count = size[0] * size[1] * 3
        while data := self.source.read(count):
            while len(data) < count and (more := self.source.read(count - len(data))):
                data += more
            if len(data) < count:
                self.missing = (
                    f"{self.name} ends in the middle of frame {self.taken}: {len(data)} of {count} bytes"
                )
                return
            yield np.frombuffer(data, np.uint8).reshape(*size, 3)

    # ---- videos --------------------------------------------------------------------------------------------

    def _video(self) -> Iterator[tuple[int, int, np.ndarray]]:
        to_rgb, begun = ToRGB(), None
        decoded = self._decoded()
        try:
            for number, frame in decoded:
                if begun is None:
                    begun = (frame.pts or 0) if self._origin is None else self._origin
                pts, duration = self._time(frame)
                if self._before(number, pts - begun):
                    continue
                if self._behind(number, pts - begun):
                    return
                if not self.taken:
                    self._check(frame)
                self._last, self.taken = pts, self.taken + 1
                yield pts, duration, to_rgb(frame)
            self._look_for_the_end()
        except UserError as error:  # nothing more can be read
            self.missing = str(error)
        finally:
            decoded.close()

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        """(number, decoded frame); packets that cannot be decoded are counted and passed over."""
        import av

        self._origin = None
        if self.start is not None and not hasattr(self.source, "read"):
            with opened(self.source) as (_, stream):
                self._facts(stream)
            if (number := self._first_number()) is not None:
                yield from numbered(self.source, number, True)
                return
        damaged, number = 0, 0
        with opened(self.source, True) as (container, stream):
            self._facts(stream)
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except IndexError:  # PyAV: a packet of a stream that appears only now, and is not ours
                    packets = container.demux(stream)
                    continue
                except av.error.FFmpegError as error:
                    self.missing = f"{self.name} cannot be read to its end ({error.strerror})"
                    break
                if packet is None:
                    break
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    damaged += 1
                    continue
                for frame in frames:
                    yield number, frame
                    number += 1
        if damaged and not self.missing:
            self.missing = f"{self.name}: {damaged} damaged pieces could not be decoded"

    def _first_number(self) -> int | None:
        """The number of the first frame wanted; None when only decoding tells."""
        times = frame_times(self.source)
        if times is None:
            return None
        stamps = [pts for pts, _ in times]
        self._origin = stamps[0]
        if self.start.in_frames:
            return int(self.start.value)
        return bisect.bisect_left(stamps, stamps[0] + self.start.value / self.time_base)

    def _facts(self, stream: Any) -> None:
        self.is_video, self.time_base = True, stream.time_base
        self.aspect = stream.sample_aspect_ratio or None
        rate = Fraction(stream.average_rate or stream.guessed_rate or STILL_FPS).limit_denominator(1001)
        self.fps = rate if 1 <= rate <= 1000 else STILL_FPS
        whole = self.start is None and self.end is None
        self.frames = stream.frames or None
        self._announced = _announced_end(stream) if whole else None
        if not whole and self.frames:
            self.frames = self._within(self.frames)

    def _before(self, number: int, since: int) -> bool:
        s = self.start
        return s is not None and (number < s.value if s.in_frames else since * self.time_base < s.value)

    def _behind(self, number: int, since: int) -> bool:
        e = self.end
        return e is not None and (number >= e.value if e.in_frames else since * self.time_base >= e.value)

    def _time(self, frame: Any) -> tuple[int, int]:
        """Time stamp and duration in `time_base`; time stamps grow, also where a damaged file's do not."""
        usual = max(1, round(1 / self.fps / self.time_base))
        duration = frame.duration if 0 < (frame.duration or 0) < 1000 * usual else usual
        if self._last is None:
            return (0 if frame.pts is None else frame.pts), duration
        return max(self._last + (usual if frame.pts is None else 1), frame.pts or 0), duration

    def _check(self, frame: Any) -> None:
        """What the first frame says: colours, pixel shape; HDR and transparency are refused."""
        if frame.color_trc in HDR:
            raise UserError(
                f"{self.name} is HDR ({HDR[frame.color_trc]}); the model knows SDR only: convert it first, "
                f"for instance with ffmpeg's zscale and tonemap filters"
            )
        parts = frame.format.components
        if any(part.is_alpha for part in parts) and frame.to_ndarray(format="rgba")[..., 3].min() < 255:
            raise UserError(f"{self.name} {_TRANSPARENT}")
        if self.aspect and frame.rotation % 180:
            self.aspect = 1 / self.aspect
        if not frame.format.is_rgb and not frame.format.name.startswith(("gray", "pal")):
            self.color = _color_of(frame)

    def _look_for_the_end(self) -> None:
        if self.missing or self._last is None or self._announced is None:
            return
        usual = 1 / self.fps
        ended = self._last * self.time_base + usual
        few = self.frames is None or self.taken < self.frames
        if few and ended < self._announced - max(2 * usual, Fraction(1, 10)):
            of = f" of {self.frames}" if self.frames else ""
            self.missing = (
                f"{self.name} ends early: {self.taken}{of} frames, {float(ended):.2f} s of "
                f"{float(self._announced):.2f} s"
            )


_TRANSPARENT = "is transparent in places, which a video cannot hold: put it on a plain colour first"


def _refuse_transparent_image(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            seen = "A" in image.getbands() or "transparency" in image.info
            seen = seen and image.convert("RGBA").getextrema()[3][0] < 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # said when it is read
    if seen:
        raise UserError(f"{path} {_TRANSPARENT}")


def _color_of(frame: Any) -> Color:
    """The frame's tags; what it leaves open is BT.709, of what is no BT.709 unspecified (2)."""
    matrix = frame.colorspace if frame.colorspace in _MATRICES else 1
    other = 1 if matrix == 1 else 2
    primaries, transfer = (
        tag if tag not in (0, 2, 3) else other for tag in (frame.color_primaries, frame.color_trc)
    )
    return Color(int(matrix), 2 if frame.color_range == 2 else 1, int(primaries), int(transfer))


def _announced_end(stream: Any) -> Fraction | None:
    """When the video ends, in seconds, by what the container says of this stream; None if nothing."""
    if text := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        return int(text[1]) * 3600 + int(text[2]) * 60 + Fraction(text[3])
    if stream.duration:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    return None
