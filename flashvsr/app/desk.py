"""Jobs of the app: a form becomes the arguments of `upscale`, and what the command would do is done.

Knows nothing of gradio. One job at a time has the device, whoever asks.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flashvsr.base.cli import UserError, clock
from flashvsr.base.heap import give_back
from flashvsr.commands import paths
from flashvsr.commands import upscale as command
from flashvsr.streaming import job

# The options of `upscale` that the form has, with what the command takes when they are left out.
DEFAULTS: dict[str, Any] = {
    "model": None, "scale": 4, "decoder": "auto", "color-fix": "adain", "seed": 0, "sparse-ratio": None,
    "local-range": 11, "kv-chunks": 3, "tile": None, "overlap": 24, "memory": None, "offload": False,
    "start": None, "end": None, "crf": 15, "no-audio": False,
}  # fmt: skip
BEFORE_CRF = 10  # of the input as the page shows it
Tell = Callable[[int, int | None, str], Any]  # frames done, of how many, and a sentence


class Cancelled(Exception):
    """Whoever started the job has stopped it or has gone."""


@dataclass(frozen=True)
class Result:
    """A finished job: its file, the input as a browser can play it, and what is to be said."""

    out: Path
    before: Path
    height: int
    width: int
    sentence: str
    command: str = ""  # that makes the same file


class Same:
    """The method that gives every frame as it is."""

    def push(self, frames: np.ndarray) -> np.ndarray:
        return frames

    def flush(self) -> np.ndarray:
        return np.empty((0, 0, 0, 3), np.uint8)


def arguments(form: Mapping[str, Any]) -> list[str]:
    """What is filled in and not the command's default, as its options; UserError for an unknown name."""
    found = []
    for name, value in form.items():
        if name not in DEFAULTS:
            raise UserError(f"unknown setting {name!r}; there are {', '.join(DEFAULTS)}")
        text = f"{value:.15g}" if isinstance(value, float) else str(value).strip()
        default = "" if DEFAULTS[name] is None else str(DEFAULTS[name])
        if value is None or value is False or text in ("", default):
            continue
        found += [f"--{name}"] if value is True else [f"--{name}={text}"]
    return found


def _stopping(tell: Tell, stop: threading.Event) -> Tell:
    """`tell`, which ends the job that has been stopped."""

    def told(done: int, total: int | None, text: str) -> None:
        if stop.is_set():
            raise Cancelled
        tell(done, total, text)

    return told


class Desk:
    """Runs the jobs of all sessions of the app, one after another, with their files in `folder`.

    options: further options of `upscale` that every job gets (device, dtype, lr-projector).
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self.folder, self.options = folder, list(options)
        self._device = threading.Lock()
        self._running: list[tuple[str, threading.Event]] = []
        self._results: dict[str, Path] = {}  # of each session, the newest

    def describe(self, clip: str, form: Mapping[str, Any]) -> tuple[str, np.ndarray]:
        """What a clip is, in a sentence, and its first frame; UserError if it cannot be read."""
        given = self._given(clip, form)
        with command.open_footage(given, clip) as footage:
            first = next(iter(footage))
            frames = "" if footage.frames is None else f", {footage.frames} frames"
            fps = f"{float(footage.fps):.4g}"
            return f"{Path(clip).name}: {footage.width}x{footage.height}{frames} at {fps} a second", first

    def run(self, session: str, clip: str, form: Mapping[str, Any], tell: Tell) -> Result:
        """Upscales `clip` as `python -m flashvsr upscale` does with the same settings, to the same bytes.

        Waits for the device. The session's older result is removed when the new one is there. Raises
        UserError, and Cancelled at the next frames after `stop(session)`; then nothing is left of it.
        """
        given = self._given(clip, form)
        stop = threading.Event()
        mine = (session, stop)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._running.append(mine)
        try:
            with self._turn(stop):
                result = self._upscale(given, clip, folder, _stopping(tell, stop))
        except BaseException:
            shutil.rmtree(folder)
            raise
        finally:
            self._running.remove(mine)
        self._forget(session)
        self._results[session] = folder
        words = [Path(clip).name, given.out, *arguments(form), *self.options]
        return replace(result, command=shlex.join(["python", "-m", "flashvsr", "upscale", *words]))

    def stop(self, session: str | None = None) -> bool:
        """Stops the session's jobs (None: all), waiting or running; whether there were any."""
        mine = [event for whose, event in list(self._running) if session in (None, whose)]
        for event in mine:
            event.set()
        return bool(mine)

    def leave(self, session: str) -> None:
        """The session is over: its job ends, its result is removed."""
        self.stop(session)
        self._forget(session)

    def close(self) -> None:
        """Stops all jobs and waits for the one that runs."""
        self.stop()
        with self._device:
            pass

    def _forget(self, session: str) -> None:
        folder = self._results.pop(session, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[None]:
        while not self._device.acquire(timeout=0.1):
            if stop.is_set():
                raise Cancelled
        try:
            yield
        finally:
            give_back()
            self._device.release()

    def _given(self, clip: str, form: Mapping[str, Any]) -> Any:
        """The command's arguments; what argparse says of a wrong one becomes a UserError."""

        def error(message: str) -> NoReturn:
            raise UserError(message.removeprefix("argument "))

        file, parser = Path(clip), command.parser()
        parser.error = error
        suffix = file.suffix.lower() if file.suffix.lower() in paths.KEPT_SUFFIXES else ".mp4"
        out = f"{file.stem}-upscaled{suffix}"
        return command.parse([*arguments(form), *self.options, "--", clip, out], parser)

    def _upscale(self, given: Any, clip: str, folder: Path, tell: Tell) -> Result:
        from flashvsr.streaming.upscaler import StreamingUpscaler  # brings torch

        notes: list[str] = []
        tell(0, None, "opening the model")
        footage = command.open_footage(given, clip)
        method = command.open_method(given, notes.append)
        if not isinstance(method, StreamingUpscaler):
            raise UserError(
                f"{given.model} is a model of kind {method.model.info.kind!r}, which takes whole clips; "
                f"the app streams: choose a one-step model, or use python -m flashvsr upscale"
            )
        height, width = method.output.size(footage.height, footage.width)
        # No frames yet, but their size: tiles are chosen, and what does not fit is refused.
        method.push(np.empty((0, footage.height, footage.width, 3), np.uint8))
        plan = f"{footage.width}x{footage.height} → {width}x{height}, {_memory(method)}"
        out, before = folder / given.out, folder / "before.mp4"
        target, count = command.target_of(given, str(out)), _Count(footage.frames, plan, tell)
        done = job.upscale(footage, method, (height, width), target, on_frames=count)
        count = _Count(done.times.frames, "writing the input for the comparison", tell)
        again = command.open_footage(given, clip)
        target = job.Target(str(before), crf=BEFORE_CRF, audio=False)
        job.upscale(again, Same(), (again.height, again.width), target, on_frames=count)
        seconds, frames = done.times.total, done.times.frames
        said = [
            f"{frames} frames in {clock(seconds)}, {seconds / frames:.2g} s each. {plan}.",
            *(f"Incomplete: {what}." for what in done.missing),
            *(f"Not copied: {what}." for what in done.dropped),
            *(f"{note}." for note in notes),
        ]
        return Result(out, before, height, width, " ".join(said))


class _Count:
    """Frames done, told with speed and time left."""

    def __init__(self, total: int | None, plan: str, tell: Tell) -> None:
        self.done, self.total, self.plan, self.tell = 0, total, plan, tell
        self.begun = time.monotonic()
        self(0)

    def __call__(self, frames: int) -> None:
        self.done += frames
        seconds = time.monotonic() - self.begun
        text = f"{self.plan}: {self.done} of {self.total or '?'} frames"
        if self.done:
            text += f", {self.done / seconds:.2g} a second"
            if self.total:
                text += f", {clock(seconds / self.done * max(self.total - self.done, 0))} left"
        self.tell(self.done, self.total, text)


def _memory(method: Any) -> str:
    """What a stream whose tiles are chosen will take of what there is, in words."""
    from flashvsr.streaming.preflight import GIB, budget

    limit = budget(method.model, method.device, method.tiling.memory or "auto")
    of = "" if limit is None else f" of {limit / GIB:.1f}"
    cut = "" if len(method.tiles.places) == 1 else f", tiles: {method.tiles}"
    return f"memory about {method.memory.device / GIB:.1f}{of} GiB{cut}"
