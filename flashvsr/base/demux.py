"""Decoded frames of a video file with their numbers: opening, finding the keyframe before a frame, decoding.

Frames are numbered as they are shown. A frame in the middle is reached by a seek only where that is known to
give the very same pictures; elsewhere decoding starts at the beginning.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError
from flashvsr.base.stills import Source, name_of

# Of these every packet is one picture with its own time stamp, so frame k is found without decoding 0..k-1.
_SEEKABLE = frozenset(("h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "prores", "ffv1", "dnxhd"))
MOST_PIXELS = 1 << 27  # a damaged header may announce any size; 8K is a quarter of this

Keyframes = Sequence[tuple[int, int]]


def numbered(source: Source, start: int, ahead: bool, keyframes: Keyframes = ()) -> Iterator[tuple[int, Any]]:
    """(number, decoded frame) in the order shown, from frame `start` or one before it; nothing when the
    video ends before `start`. `ahead` decodes in threads, which pays when all frames are wanted.

    `keyframes`, as `keyframes_of` gives them, saves reading the packets up to `start`.
    """
    if start and not keyframes:
        times = frame_times(source, start)
        if times is not None and len(times) <= start:
            return
        keyframes = keyframes_of(times or (), apart=1)
    entry = max((k for k in keyframes if k[0] <= start), default=None)
    if start and entry is not None:
        with opened(source, ahead) as (container, stream):
            number, time = entry
            if number:
                container.seek(time, stream=stream)
            frames = _entered(container, stream, time, start - number)
            first = next(frames, None)
            if first is not None:
                yield from enumerate(itertools.chain([first], frames), start)
                return
    with opened(source, ahead) as (container, stream):
        k = None
        for k, frame in enumerate(container.decode(stream)):
            yield k, frame
        if k is None:
            raise UserError(f"{name_of(source)} holds no decodable frame; replace or leave out the file")


def frame_times(
    source: Source, last: int | None = None, each: Callable[[], None] = lambda: None
) -> list[tuple[int, bool]] | None:
    """(time stamp, is keyframe) of frames 0..last (default: all) in the order shown, read without decoding.

    None where packets do not tell: then a frame is only found by decoding from the beginning. `each` is
    called at every packet.
    """
    with opened(source) as (container, stream):
        if stream.codec_context.name not in _SEEKABLE or container.format.name == "avi":
            return None
        seen: list[tuple[int, bool]] = []
        before = None
        for packet in container.demux(stream):
            each()
            if packet.size == 0:  # the packet that ends the stream
                continue
            if packet.pts is None or packet.is_corrupt or packet.is_discard:
                return None
            seen.append((packet.pts, packet.is_keyframe))
            if packet.dts is None and before is None:
                continue  # Matroska tells no decoding times; FFmpeg finds them after a few packets
            if packet.dts is None or packet.pts < packet.dts or (before is not None and packet.dts <= before):
                return None
            before = packet.dts
            # Later packets are shown no earlier than their dts, so none comes before frame `last` any more.
            enough = last is not None and len(seen) > last and len(seen) % 32 == 0
            if enough and sorted(seen)[last][0] < packet.dts:
                break
        if not seen or not seen[0][1] or min(seen)[0] < seen[0][0]:
            return None  # frames shown before the first keyframe may not decode
        ordered = sorted(seen)
        if len({t for t, _ in ordered}) < len(ordered):
            return None
        return ordered if last is None else ordered[: last + 1]


def keyframes_of(times: Sequence[tuple[int, bool]], apart: int = 12) -> tuple[tuple[int, int], ...]:
    """(frame number, time stamp) of the keyframes among `frame_times`, the first and then at least `apart`
    frames from one to the next: enough to seek by, also where every frame is one."""
    chosen: list[tuple[int, int]] = []
    for number, (time, is_key) in enumerate(times):
        if is_key and (not chosen or number - chosen[-1][0] >= apart):
            chosen.append((number, time))
    return tuple(chosen)


def _entered(container: Any, stream: Any, time: int, skip: int) -> Iterator[Any]:
    """Frames from the `skip`-th after the keyframe shown at `time` on; none when that keyframe does not come.

    The container stands at the keyframe. Of the frames between, those that no other refers to are not decoded
    (H.264 marks them).
    """
    packets = container.demux(stream)
    read, times = [], []
    for packet in packets:  # until it is known when the wanted frame is shown
        read.append(packet)
        if packet.pts is None:  # the end of the stream
            break
        # What is shown before the keyframe belongs to the group before it and may be incomplete.
        times += [packet.pts] if packet.pts >= time else []
        if len(times) > skip and packet.dts is not None and sorted(times)[skip] < packet.dts:
            break
    if time not in times or len(times) <= skip:
        return
    wanted, entered = sorted(times)[skip], False
    context = stream.codec_context
    for packet in itertools.chain(read, packets):
        needless = context.name == "h264" and packet.pts is not None and packet.pts < wanted
        context.skip_frame = "NONREF" if needless else "DEFAULT"
        for frame in packet.decode():
            entered = entered or frame.pts == time
            if frame.pts is None or (frame.pts >= wanted and not entered):
                return
            if frame.pts >= wanted:
                yield frame


@contextmanager
def opened(source: Source, ahead: bool = False) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; what FFmpeg cannot read becomes a UserError naming the file."""
    import av

    name = name_of(source)
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise UserError(f"{name} does not exist; check the path")
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not isinstance(source, (str, Path)):
        source.seek(0)
    try:
        source = source if hasattr(source, "read") else str(source)
        with av.open(source, metadata_errors="replace") as container:  # titles in other encodings, or damaged
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise UserError(f"{name} has no video stream; give a video file")
            if streams[0].codec_context is None:
                raise UserError(f"{name} holds video of a codec unknown here; convert it to H.264 first")
            streams[0].codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            if ahead:
                streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{name} cannot be read as a video ({reason}); replace or leave it out") from error
