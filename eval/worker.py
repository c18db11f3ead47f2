"""Does units: makes an output, writes it losslessly, reads it back and scores it; alone or in processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from eval.cache import FrameSink, Output, checked
from eval.datasets import window
from eval.methods import Upscaler, open_method
from eval.metrics.scoring import Metric, Suite, Values
from eval.units import Fit, Job, Unit, fitted
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.measure import machine
from flashvsr.base.threads import ahead
from flashvsr.base.video_io import read_frames
from flashvsr.streaming.pipeline import run, stacks

_STACK_AREA = 2**23  # pixels of SR read ahead together (a 4K frame): memory stays bounded at any size

OnFrames = Callable[[int], Any]


@contextmanager
def explained(unit: Unit, device: str, remedy: str) -> Iterator[None]:
    """Want of memory as one sentence that names the method and the clip."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"method {unit.method.name!r} ran out of memory on clip {unit.clip.name!r} "
            f"({unit.clip.width}x{unit.clip.height}, {unit.clip.frames} frames) on {device}; {remedy}"
        ) from error


class Worker:
    """Does units on one device, keeping the method it opened last and one suite of metrics."""

    def __init__(self, job: Job, device: str):
        self.job, self.device = job, device
        self._opened: tuple[Any, Callable[[], Upscaler]] | None = None
        self._suite: Suite | None = None

    def run(self, unit: Unit, on_frames: OnFrames = lambda n: None) -> None:
        """Complete a unit: its output, then the scores it lacks."""
        output, keys = self.job.missing(unit)
        if output is None:
            with explained(unit, self.device, "give it tile=, --dtype bfloat16 or fewer --workers"):
                output = self._generate(unit, on_frames)
            output, keys = self.job.missing(unit)
        if keys:
            with explained(unit, self.device, "its frames are kept: score them with --device cpu"):
                self._score(unit, output, keys, on_frames)

    def _generate(self, unit: Unit, on_frames: OnFrames) -> Output:
        """Run the method and keep its frames; time is that of push and flush, until frames are in the host's
        memory."""
        upscaler = self._open(unit)()
        with FrameSink(self.job.cache.output_path(unit.key)) as sink:
            # On a CPU other threads would take from the time that is measured.
            overlap = not self.device.startswith("cpu")
            times = run(upscaler, unit.clip.read_lq(), sink.write, overlap=overlap, on_frames=on_frames)
            made = Output(sink.path, times.frames, sink.height, sink.width, sink.pixels)
            fitted(unit, made, self.job.align)
        waited = 0.0
        for seconds, given in times.pushes:
            waited += seconds
            if given:
                break
        return self.job.cache.keep_output(
            unit.key,
            {
                "frames": made.frames,
                "height": made.height,
                "width": made.width,
                "pixels": made.pixels,
                "seconds_per_frame": times.model / times.frames,
                "first_output_seconds": waited,
                "timed_on": {**machine(), "device": self.device},
                "in_use": getattr(upscaler, "in_use", {}),  # all a method must have is push and flush
            },
        )

    def _open(self, unit: Unit) -> Callable[[], Upscaler]:
        what = unit.method.name, unit.test_set.scale
        if self._opened is None or self._opened[0] != what:
            self._opened = None  # the old model goes before the new one comes
            make = open_method(unit.method, unit.test_set.scale, self.device, self.job.dtype)
            self._opened = what, make
        return self._opened[1]

    def _score(self, unit: Unit, output: Output, keys: Sequence[str], on_frames: OnFrames) -> None:
        if self._suite is None:
            self._suite = self.job.choice.suite(self.device)
        fit, crop = fitted(unit, output, self.job.align), self.job.choice.crop
        side = min(fit.height, fit.width) - 2 * crop
        wanted = [m for m in self._suite.metrics if m.key in keys]
        fitting = tuple(m for m in wanted if side >= m.least)
        found = {m.key: too_small(m, fit) for m in wanted if side < m.least}
        if fitting:
            found |= score(unit, output, fit, Suite(fitting, crop, self.device), on_frames)
        for key, values in found.items():
            kept = {"clip": values.clip, "per_frame": values.per_frame.tolist()}
            kept |= {"first": values.first, "reason": values.reason}
            self.job.cache.keep_score(self.job.score_key(unit, output, key), kept)


def too_small(metric: Metric, fit: Fit) -> Values:
    """No value, and why: frames smaller than the metric can judge."""
    need = f"{metric.key} needs frames of at least {metric.least}x{metric.least} pixels"
    return Values(
        torch.empty(0, dtype=torch.float64), None, reason=f"{need}, these are {fit.width}x{fit.height}"
    )


def score(unit: Unit, output: Output, fit: Fit, suite: Suite, on_frames: OnFrames) -> dict[str, Values]:
    """All metrics over a clip: each side is read and decoded once, in a thread of its own, while the stack
    before is being scored."""
    clip = unit.clip
    together = max(1, min(8, _STACK_AREA // (fit.height * fit.width)))
    frames = read_frames(output.path, count=fit.frames)
    if unit.made is None and fit.frames == output.frames:
        frames = checked(frames, output)
    sides = {"sr": _windows(frames, fit, clip.align)}
    if clip.gt is not None:
        sides["hr"] = _windows(read_frames(clip.gt, count=fit.frames), fit, clip.align)
    else:
        sides["lq"] = read_frames(clip.lq, count=fit.frames)
    scoring = suite.start()
    with ExitStack() as threads:
        incoming = [threads.enter_context(ahead(stacks(side, together))) for side in sides.values()]
        for parts in zip(*incoming, strict=False):
            if len({len(part) for part in parts}) > 1:
                break
            scoring.push(**dict(zip(sides, parts, strict=True)))
            on_frames(len(parts[0]))
    if scoring.frames != fit.frames:
        raise UserError(
            f"{output.path} and its clip gave about {scoring.frames} frames each, not {fit.frames}; one of "
            f"them has changed: run again, or with --fresh"
        )
    return scoring.finish()


def _windows(frames: Iterable[np.ndarray], fit: Fit, align: str) -> Iterator[np.ndarray]:
    return (window(frame, fit.height, fit.width, align) for frame in frames)


def run_units(units: Sequence[Unit], job: Job, devices: Sequence[str], progress: Progress) -> None:
    """Do units with a process per entry of `devices`, each taking the next one when it is done.

    The first error ends all of them and is raised here; so does the end of a process, whose unit it names.
    A worker whose parent has died ends after its unit.
    """
    context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
    waiting, busy, processes = list(units), {}, []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            arguments = (theirs, job, device, max(1, _cores() // len(devices)))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            busy[ours] = _hand(ours, waiting)
        while busy:
            for ours in wait(list(busy)):
                unit = busy[ours]
                if unit is not None and _done(ours, unit, progress):
                    progress.update(0, method=unit.method.name, clip=unit.clip.name)
                    busy[ours] = _hand(ours, waiting, unit)
                if busy[ours] is None:
                    del busy[ours]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hand(ours: Connection, waiting: list[Unit], last: Unit | None = None) -> Unit | None:
    """Give a worker its next unit, of the method it has open if there is one; None ends it."""
    unit = next((u for u in waiting if last is not None and u.method.name == last.method.name), None)
    unit = unit or next(iter(waiting), None)
    if unit is not None:
        waiting.remove(unit)
    try:
        ours.send(unit)
    except ConnectionError:
        if unit is not None:
            raise _ended(unit) from None
    return unit


def _ended(unit: Unit) -> UserError:
    return UserError(
        f"the process for method {unit.method.name!r} on clip {unit.clip.name!r} was ended from outside, "
        f"perhaps for want of memory; what is complete stays: run the same command with fewer --workers"
    )


def _done(ours: Connection, unit: Unit, progress: Progress) -> bool:
    """Read one message of a worker: whether its unit is done."""
    try:
        message = ours.recv()
    except (EOFError, ConnectionError):  # reset: it had not read all that was sent
        raise _ended(unit) from None
    if isinstance(message, Exception):
        raise message
    if message is None:
        return True
    progress.update(message)
    return False


def _serve(connection: Connection, job: Job, device: str, threads: int) -> None:
    """A worker's process: units in; numbers of frames, then None, out; the error that ends it."""
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    worker = Worker(job, device)
    try:
        while (unit := connection.recv()) is not None:
            worker.run(unit, connection.send)
            connection.send(None)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return  # the parent has gone, or ends us
    except Exception as error:
        connection.send(error)
        if not isinstance(error, (UserError, OSError)):
            raise
