"""Writing frames to a video file or a folder of PNG frames."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.companions import Companions
from flashvsr.base.files import atomic, atomic_dir
from flashvsr.base.footage import BT709, Color
from flashvsr.base.stills import FRAME_NAME, is_video

Clock = deque[tuple[int, int]]
_LIKE_MP4 = (".mp4", ".m4v", ".mov")
_MP4 = {"movflags": "+faststart"}
_SWSCALE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}  # H.273's matrix numbers to swscale's


def pixel_format(codec: str, height: int, width: int, ten_bit: bool = False, given: str | None = None) -> str:
    """What an encoder is given: 4:2:0, or 4:4:4 when a side is odd, of 8 or 10 bits, as far as it can.

    UserError for an unknown codec and a pixel format (`given`) that it does not take.
    """
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    try:
        formats = [f.name for f in Codec(codec, "w").video_formats or ()]
    except UnknownCodecError:
        raise UserError(f"codec {codec!r} is unknown here; libx264, libx265 and ffv1 are usual") from None
    if given is not None:
        if given not in formats:
            raise UserError(
                f"codec {codec} takes no pixels of format {given!r}; it takes {', '.join(formats)}"
            )
        return given
    even = () if height % 2 or width % 2 else ("yuv420p", "yuv422p")
    eight = [*even, "yuv444p"]
    ten = [f"{name}10le" for name in eight]
    found = next((f for f in (ten if ten_bit else [*eight, *ten]) if f in formats), None)
    if found is None and ten_bit:
        raise UserError(f"codec {codec} has no 10 bits at {width}x{height}; libx265 and prores_ks have them")
    return found or "yuv420p"


class VideoWriter:
    """Write frames to a video file, or to a folder of PNG frames (frame-000000.png, ...) when the path ends
    in "/" or has no suffix.

    Use as a context manager: the file appears whole when the block ends, and not at all when it raises.
    Pixels are as `pixel_format` says (never padded), or `pix_fmt`, converted and tagged as `color`.
    `lossless` writes RGB exactly (libx264rgb for libx264, else ffv1; for .mp4, .mov or .mkv). `clock` holds
    each frame's (time stamp, duration) in `time_base` before it is written; without it frames follow at
    `fps`. `companions` are copied beside the pictures. `aspect` is that of a pixel. A folder is replaced only
    when it holds nothing but such frames. UserError for what FFmpeg cannot write, and when no frame came.
    """

    def __init__(
        self,
        path: str | Path,
        fps: Fraction | float,
        height: int,
        width: int,
        codec: str = "libx264",
        crf: float | None = 15,
        lossless: bool = False,
        *,
        pix_fmt: str | None = None,
        color: Color = BT709,
        aspect: Fraction | None = None,
        clock: Clock | None = None,
        time_base: Fraction | None = None,
        companions: Companions | None = None,
    ) -> None:
        self.as_folder = str(path).endswith("/") or not Path(path).suffix
        self.path, self.fps = Path(path), Fraction(fps).limit_denominator(100_000)
        self.height, self.width = height, width
        self.codec, self.crf, self.lossless = codec, crf, lossless
        self.pix_fmt, self.color, self.aspect = pix_fmt, color, aspect
        self.companions = companions
        self._times = None if clock is None else _Times(clock, time_base)
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
                self._part = stack.enter_context(atomic_dir(self.path, replace=is_ours(self.path)))
            else:
                self._part = stack.enter_context(atomic(self.path))
                self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        import av

        options = _MP4 if self.path.suffix.lower() in _LIKE_MP4 else {}
        with self._explained():
            self._container = stack.enter_context(av.open(str(self._part), "w", container_options=options))
            self._stream = self._container.add_stream(self._codec_name(), rate=self.fps)
        self._configure(self._stream)
        if self._times is not None:
            self._stream.time_base = self._times.time_base
        with self._explained():
            if self.companions is not None:
                self.companions.attach(self._container)
            self._container.start_encoding()  # what cannot be written is said now, not after hours

    def _configure(self, stream: Any) -> None:
        stream.height, stream.width = self.height, self.width
        if self.aspect is not None:
            stream.codec_context.sample_aspect_ratio = self.aspect
        if self.lossless:
            stream.pix_fmt = "rgb24" if stream.codec_context.name == "libx264rgb" else "bgr0"
            stream.options = {"qp": "0"}
            return
        stream.pix_fmt = self.pix_fmt or pixel_format(self.codec, self.height, self.width)
        stream.options = {} if self.crf is None else {"crf": f"{self.crf:g}"}
        if stream.codec_context.name == "libx264":
            # with macroblock trees x264 gives other bits from run to run on AVX-512 machines
            stream.options |= {"x264-params": "mbtree=0"}
        if stream.codec_context.name == "libx265":
            stream.options |= {"x265-params": "log-level=error"}
            if self.path.suffix.lower() in _LIKE_MP4:
                stream.codec_context.codec_tag = "hvc1"  # what Apple's players want to see
        context, color = stream.codec_context, self.color
        context.colorspace, context.color_range = color.matrix, color.range
        context.color_primaries, context.color_trc = color.primaries, color.transfer

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What FFmpeg refuses (a codec the file type cannot hold, a full disk) as one sentence."""
        import av

        try:
            yield
        except UserError:
            raise
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
        from av.video.reformatter import Interpolation

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if not self.lossless:
            flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
            frame = frame.reformat(
                format=self._stream.pix_fmt,
                dst_colorspace=_SWSCALE[self.color.matrix],
                dst_color_range=self.color.range,
                interpolation=flags | Interpolation.BITEXACT,
            )
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        if self._times is not None:
            self._times.add(self.frames)
        with self._explained():
            self._mux(self._stream.encode(frame))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if self._times is not None:
                self._times.stamp(packet)
            if self.companions is not None:
                self.companions.up_to(self._container, packet.dts * packet.time_base)
            self._container.mux(packet)

    def _finish(self) -> None:
        if not self.frames:
            raise UserError(f"{self.path}: no frames came, so nothing is written; check the input")
        if not self.as_folder:
            with self._explained():
                self._mux(self._stream.encode())
                if self.companions is not None:
                    self.companions.up_to(self._container, None)
                self._container.close()

    def leave(self, path: Path) -> None:
        """Ends before the clip does: what was written so far becomes `path`, and nothing `self.path`."""
        self.companions, copied = None, self.companions  # its sound would be longer than the pictures
        self._finish()
        if self.as_folder and is_ours(path):
            shutil.rmtree(path)
        os.replace(self._part, path)
        self.companions = copied

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            with suppress(OSError):  # a full disk fails again when the file is closed
                self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()


def join(
    segments: list[Path], path: Path, clock: Clock, time_base: Fraction, companions: Companions | None
) -> None:
    """Makes one file of Matroska segments of one encoding, each of which can be decoded by itself, without
    decoding them; frames get the times of `clock`. Atomic; UserError for what the file type cannot hold."""
    import av

    number_of, lead = {}, 0
    for segment in segments:
        number_of[segment] = order = _numbers(segment)
        lead = max([lead, *(n - number for n, number in enumerate(order))])
    times, count = _Times(clock, time_base), 0
    options = _MP4 if path.suffix.lower() in _LIKE_MP4 else {}
    try:
        with (
            atomic(path) as part,
            av.open(str(part), "w", container_options=options) as out,
            ExitStack() as stack,
        ):
            inputs = (stack.enter_context(av.open(str(segment))) for segment in segments)
            first = next(inputs)
            stream = out.add_stream_from_template(first.streams.video[0])
            stream.time_base = time_base
            if options and stream.codec_context.codec.canonical_name == "hevc":
                stream.codec_context.codec_tag = "hvc1"
            if companions is not None:
                companions.attach(out)
            for segment, file in zip(segments, itertools.chain([first], inputs), strict=True):
                order = number_of[segment]
                for n, (packet, number) in enumerate(zip(_pictures(file), order, strict=True)):
                    while times.added <= count + number:
                        times.add(times.added)
                    packet.pts, packet.dts = count + number, count + n - lead
                    times.stamp(packet)
                    packet.stream = stream
                    if companions is not None:
                        companions.up_to(out, packet.dts * packet.time_base)
                    out.mux(packet)
                count += len(order)
                file.close()
            if companions is not None:
                companions.up_to(out, None)
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: writing failed ({reason}); libx264 in .mp4 works") from error


def _pictures(file: Any) -> Iterator[Any]:
    return (packet for packet in file.demux(video=0) if packet.size)


def _numbers(segment: Path) -> list[int]:
    """The number of each packet's frame among those of its segment, in the order of the file."""
    import av

    with av.open(str(segment)) as file:
        shown = [packet.pts for packet in _pictures(file)]
    place = {pts: number for number, pts in enumerate(sorted(shown))}
    return [place[pts] for pts in shown]


class _Times:
    """Puts the times of frames on the packets of an encoder that saw frame numbers: what it decides then does
    not depend on times, and a variable rate is kept."""

    def __init__(self, clock: Clock, time_base: Fraction) -> None:
        self._clock, self.time_base = clock, time_base
        self.added = 0
        self._shown: dict[int, tuple[int, int]] = {}
        self._order: deque[int] = deque()
        self._first: int | None = None
        self._origin: int | None = None
        self._lead: int | None = None  # packets before the one that is decoded at the first frame's time

    def add(self, number: int) -> None:
        """Frame `number` is about to be encoded."""
        pts, duration = self._clock.popleft()
        self.added += 1
        if self._origin is None:
            self._origin, self._usual = pts, duration
        self._shown[number] = pts, duration
        self._order.append(pts)

    def stamp(self, packet: Any) -> None:
        """`packet` has a frame's number for its pts; the n-th has n less the encoder's delay for its dts."""
        if self._lead is None:
            self._lead = max(0, -packet.dts)
        pts, duration = self._shown.pop(packet.pts)
        dts = self._order.popleft() if not self._lead else self._origin - self._lead * self._usual
        self._lead = max(0, self._lead - 1)
        packet.pts, packet.dts, packet.duration = pts, min(dts, pts), duration
        packet.time_base = self.time_base


def is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but frames as written here."""
    return folder.is_dir() and all(FRAME_NAME.fullmatch(p.name) for p in folder.iterdir())
