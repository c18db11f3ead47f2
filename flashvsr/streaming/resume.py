"""Upscaling that survives a kill: finished segments and the model's state lie beside the output.

Every SEGMENT_FRAMES input frames the segment so far is closed and the stream's state saved. The same command
goes on after the last one. At the end the segments' packets, not decoded again, become one file. Where
segments end depends on the frames only, so the file is the same whether or not it was interrupted.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic, atomic_dir, load_torch, read_json, write_json
from flashvsr.base.footage import Footage
from flashvsr.base.stills import frames_of
from flashvsr.base.video_writer import VideoWriter, is_ours, join
from flashvsr.streaming import pipeline
from flashvsr.streaming.job import Done, Interrupted, Target, companions_of, video_writer
from flashvsr.streaming.state import restore, state_of
from flashvsr.streaming.upscaler import StreamingUpscaler

SEGMENT_FRAMES = 240  # a multiple of what a stream takes at once


def work_folder(out: str) -> Path:
    """Where segments and state wait."""
    path = Path(out)
    return path.with_name(path.name + ".resume")


def upscale_resumable(
    footage: Footage,
    method: StreamingUpscaler,
    size: tuple[int, int],
    target: Target,
    *,
    segment_frames: int = SEGMENT_FRAMES,
    on_frames: Callable[[int], Any] | None = None,
) -> Done:
    """As `job.upscale`, going on where an earlier call with the same input and settings was ended.

    UserError for a method or an output that cannot be resumed, and for a work folder of other settings.
    """
    if not isinstance(method, StreamingUpscaler):
        raise UserError("--resume needs a one-step model: others give nothing before the clip has ended")
    if not (target.is_video or target.is_folder):
        raise UserError(f"--resume has no effect on {target.name}; give a video or a folder as OUT")
    work = work_folder(target.out)
    _check(work, _fingerprint(footage, method, target, segment_frames))
    with ExitStack() as stack:
        stack.enter_context(footage)
        companions = companions_of(footage, target, stack)
        last, state = _newest(work)
        if state is not None:
            restore(method, state["method"])
        segments = _Segments(work, last, state, lambda path: _writer(path, footage, target, size))
        saving = _Saving(method, segments, segment_frames)
        frames = itertools.islice(footage, saving.taken, None)
        if on_frames is not None:
            on_frames(saving.given)
        try:
            with segments:
                times = pipeline.run(saving, frames, segments.write, on_frames=on_frames)
        except KeyboardInterrupt:
            raise Interrupted(
                f"what is done is kept in {work}; the same command goes on from there"
            ) from None
        if saving.given != footage.taken:
            raise RuntimeError(f"{footage.taken} frames went in, {saving.given} came out")
        if companions is not None and (footage.end is not None or footage.missing):
            companions.end = footage.ended
        _put_together(segments.paths(), target, footage, companions)
        shutil.rmtree(work)
    missing = [footage.missing, companions and companions.missing]
    return Done(times, companions.dropped if companions else [], [text for text in missing if text])


def _fingerprint(footage: Footage, method: StreamingUpscaler, target: Target, every: int) -> dict[str, Any]:
    file = Path(footage.source).resolve()
    facts = file.stat()
    chosen = {k: str(v) for k, v in method.in_use.items() if k not in ("tiles", "pipelined")}
    encoding = {k: str(getattr(target, k)) for k in ("out", "codec", "crf", "ten_bit", "pix_fmt", "audio")}
    cut = {"start": str(footage.start), "end": str(footage.end), "fps": str(footage.fps)}
    input = {"input": str(file), "bytes": facts.st_size, "changed": facts.st_mtime_ns, "segment": every}
    return (
        input | cut | chosen | {"tile": str(method.tiling.tile), "model": str(method.model.source)} | encoding
    )


def _check(work: Path, now: dict[str, Any]) -> None:
    path = work / "job.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
        return
    before = read_json(path)
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"{work} was begun with {name}={before.get(name)}, now it is {now[name]}; give the same "
                f"command, or remove the folder to start again"
            )


def _newest(work: Path) -> tuple[int, dict[str, Any] | None]:
    """The last segment that has its state, and that state; what came after it is removed."""
    states = sorted(work.glob("state-*.pt"))
    last = int(states[-1].stem.removeprefix("state-")) if states else 0
    for path in work.glob("segment-*"):
        if int(path.name[8:14]) > last:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return last, load_torch(states[-1]) if states else None


def _writer(path: str, footage: Footage, target: Target, size: tuple[int, int]) -> VideoWriter:
    if target.is_folder:
        return VideoWriter(path + "/", footage.fps, *size)
    return video_writer(path + ".mkv", footage, target, size)


class _Saving:
    """The method, which lets its state be saved at the end of every segment."""

    def __init__(self, method: StreamingUpscaler, segments: _Segments, every: int):
        self.method, self.segments, self.every = method, segments, every
        self.taken, self.given = segments.taken, segments.given

    def push(self, frames: np.ndarray) -> np.ndarray:
        out = self.method.push(frames)
        self.taken += len(frames)
        if self.taken % self.every == 0:
            out = np.concatenate([out, self.method.settle()])
        self.given += len(out)
        if self.taken % self.every == 0 and len(out):
            state = {"taken": self.taken, "given": self.given, "method": state_of(self.method)}
            self.segments.ends[self.given] = state
        return out

    def flush(self) -> np.ndarray:
        out = self.method.flush()
        self.given += len(out)
        return out


class _Segments:
    """Writes frames into segments; `ends` says, before they come, after how many of all one ends."""

    def __init__(
        self, work: Path, last: int, state: dict[str, Any] | None, make: Callable[[str], VideoWriter]
    ):
        self.work, self.number, self.make = work, last, make
        self.taken, self.given = (state["taken"], state["given"]) if state else (0, 0)
        self.written, self.ends = self.given, {}
        self._writer: VideoWriter | None = None

    def __enter__(self) -> _Segments:
        return self

    def write(self, frames: np.ndarray) -> None:
        if self._writer is None:
            self.number += 1
            self._writer = self.make(str(self.work / f"segment-{self.number:06d}")).__enter__()
        self._writer.write(frames)
        self.written += len(frames)
        state = self.ends.pop(self.written, None)
        if state is not None:
            self._close()
            self._save(state)

    def _close(self, *error: Any) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(*(error or (None, None, None)))

    def _save(self, state: dict[str, Any]) -> None:
        import torch

        with atomic(self.work / f"state-{self.number:06d}.pt") as part:
            torch.save(state, part)
        for path in sorted(self.work.glob("state-*.pt"))[:-1]:
            path.unlink()

    def __exit__(self, *error: Any) -> None:
        self._close(*error)

    def paths(self) -> Iterator[Path]:
        """The finished segments in order."""
        return iter(sorted(self.work.glob("segment-*")))


def _put_together(segments: Iterator[Path], target: Target, footage: Footage, companions: Any) -> None:
    if target.is_video:
        join(list(segments), Path(target.out), deque(footage.clock), footage.time_base, companions)
        return
    with atomic_dir(target.out, replace=is_ours(Path(target.out))) as part:
        for number, frame in enumerate(itertools.chain.from_iterable(map(frames_of, segments))):
            os.link(frame, part / f"frame-{number:06d}.png")
