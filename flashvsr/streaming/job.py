"""One clip through one method into one file: frames, times, colours, sound; whole, or what is done so far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.companions import Companions
from flashvsr.base.files import atomic
from flashvsr.base.footage import Footage
from flashvsr.base.stills import is_image
from flashvsr.base.video_writer import VideoWriter, pixel_format
from flashvsr.streaming import pipeline


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence on what was kept."""


@dataclass(frozen=True)
class Target:
    """Where frames go: a video, an image, a folder of PNG frames, or a binary file object for raw RGB frames.

    crf None is the codec's default here: 15 where it has one. UserError for a setting without effect.
    """

    out: str | BinaryIO
    codec: str = "libx264"
    crf: float | None = None
    ten_bit: bool = False
    pix_fmt: str | None = None
    audio: bool = True

    def __post_init__(self) -> None:
        if self.ten_bit and self.pix_fmt is not None:
            raise UserError(f"--10bit and --pix-fmt {self.pix_fmt} say the same thing; give one of them")
        if not self.is_video:
            default = Target.__dataclass_fields__
            for name, option in (("codec", "--codec"), ("crf", "--crf"), ("ten_bit", "--10bit"),
                                 ("pix_fmt", "--pix-fmt")):  # fmt: skip
                if getattr(self, name) != default[name].default:
                    raise UserError(f"{option} has no effect on {self.name}, which is no video")
        else:
            pixel_format(self.codec, 2, 2, self.ten_bit, self.pix_fmt)
            if self.crf is not None and not _has_crf(self.codec):
                raise UserError(f"--crf {self.crf:g} has no effect on codec {self.codec}; leave it out")

    @property
    def is_pipe(self) -> bool:
        return not isinstance(self.out, str)

    @property
    def is_image(self) -> bool:
        return not self.is_pipe and is_image(self.out)

    @property
    def is_folder(self) -> bool:
        return not self.is_pipe and (self.out.endswith("/") or not Path(self.out).suffix)

    @property
    def is_video(self) -> bool:
        return not (self.is_pipe or self.is_image or self.is_folder)

    @property
    def name(self) -> str:
        return "stdout" if self.is_pipe else self.out

    def format_of(self, height: int, width: int) -> str:
        """The encoder's pixel format at a size."""
        return pixel_format(self.codec, height, width, self.ten_bit, self.pix_fmt)


@dataclass
class Done:
    """What a job did: `dropped` was not copied, `missing` could not be read."""

    times: pipeline.Times
    dropped: list[str]
    missing: list[str]


def upscale(
    footage: Footage,
    method: Any,
    size: tuple[int, int],
    target: Target,
    *,
    overlap: bool = True,
    on_frames: Callable[[int], Any] | None = None,
) -> Done:
    """Pushes a clip's frames through `method` (`push`, `flush`) that makes them `size` and writes them.

    What cannot be read to its end is upscaled as far as it goes. The output appears whole or not at all;
    Ctrl-C leaves what is done as NAME.partial.SUFFIX and raises Interrupted. UserError as from Footage,
    Target, Companions and VideoWriter.
    """
    with ExitStack() as stack:
        stack.enter_context(footage)
        sink = stack.enter_context(_sink(footage, target, *size, stack))
        try:
            times = pipeline.run(method, footage, sink.write, overlap=overlap, on_frames=on_frames)
        except KeyboardInterrupt:
            raise Interrupted(_keep(sink, target)) from None
        if times.frames != footage.taken:
            raise RuntimeError(f"{footage.taken} frames went in, {times.frames} came out")
        companions = getattr(sink, "companions", None)
        if companions is not None and (footage.end is not None or footage.missing):
            companions.end = footage.ended
    missing = [footage.missing, companions and companions.missing]
    return Done(times, companions.dropped if companions else [], [text for text in missing if text])


def _sink(footage: Footage, target: Target, height: int, width: int, stack: ExitStack) -> Any:
    if target.is_pipe:
        return _Pipe(target.out)
    if target.is_image:
        if footage.frames != 1:
            raise UserError(
                f"{target.out} is one image, {footage.name} is not; give a video or a folder as OUT"
            )
        return _Image(target.out)
    if target.is_folder:
        return VideoWriter(target.out, footage.fps, height, width)
    companions = companions_of(footage, target, stack)
    return video_writer(
        target.out,
        footage,
        target,
        (height, width),
        clock=footage.clock,
        time_base=footage.time_base,
        companions=companions,
    )


def companions_of(footage: Footage, target: Target, stack: ExitStack) -> Companions | None:
    """What is copied beside the pictures; sets what is taken off their times, so that a cut begins at 0."""
    if target.is_video and footage.is_video and not hasattr(footage.source, "read"):
        cut = footage.start is not None or footage.end is not None
        companions = Companions(
            footage.source,
            Path(target.out).suffix,
            start=footage.first_time if cut else None,
            end=_expected_end(footage),
            audio=target.audio,
        )
        footage.shift = round(companions.shift / footage.time_base)
        return stack.enter_context(companions)
    if footage.start is not None:
        footage.shift = round(footage.first_time / footage.time_base)
    return None


def video_writer(
    path: str, footage: Footage, target: Target, size: tuple[int, int], **more: Any
) -> VideoWriter:
    """A writer of the target's encoding, with the source's colours and pixel shape."""
    return VideoWriter(
        path,
        footage.fps,
        *size,
        codec=target.codec,
        crf=15 if target.crf is None and _has_crf(target.codec) else target.crf,
        pix_fmt=target.format_of(*size),
        color=footage.color,
        aspect=footage.aspect,
        **more,
    )


def _expected_end(footage: Footage) -> Any:
    """Where a cut ends, in seconds on the source's clock, before its last frame is known."""
    if footage.end is None:
        return None
    if footage.frames is not None:
        return footage.first_time + footage.frames / footage.fps
    seconds = footage.end.value / (footage.fps if footage.end.in_frames else 1)
    return footage.first_time + seconds


def _has_crf(codec: str) -> bool:
    import av

    return any(o.name == "crf" for o in av.CodecContext.create(codec, "w").supported_options.private)


def _keep(sink: Any, target: Target) -> str:
    """Leaves a playable file of what is done; the sentence about it."""
    if not isinstance(sink, VideoWriter) or not sink.frames:
        return "nothing was written; the same command starts again"
    path = Path(target.out)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    frames = sink.frames
    sink.leave(partial)
    return f"the first {frames} frames are in {partial}; the same command starts again"


class _Image:
    """Writes the one frame of an image."""

    def __init__(self, path: str):
        self.path = Path(path)

    def __enter__(self) -> _Image:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frames: np.ndarray) -> None:
        from PIL import Image

        with atomic(self.path) as part:
            Image.fromarray(frames[0]).save(part)


class _Pipe:
    """Writes raw RGB frames to a file object."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.flush()

    def write(self, frames: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(frames).data)
