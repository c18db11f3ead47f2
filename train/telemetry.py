"""What a run tells while it runs: `metrics.jsonl` first, then a console line, then the trackers asked for.

metrics.jsonl is the source of truth: one JSON object a line with "step", "stage", "kind" ("train" or "val")
and numbers; docs/telemetry.md names every key. The console's columns are means over the steps since the last
line, its rates come from their raw timing.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from flashvsr.base.cli import Progress, UserError
from flashvsr.base.files import atomic
from flashvsr.base.measure import peak_rss_bytes
from train.guards import WINDOW
from train.launch import World
from train.trackers import Tracker, Wandb

METRICS = "metrics.jsonl"


class Telemetry:
    """The voice of one stage of a run; a no-op on every rank but the main one. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        total_steps: int,
        *,
        every: int = 10,
        quiet: bool = False,
        trackers: Sequence[Tracker] = (),
        main: bool = True,
    ) -> None:
        self.path, self.stage, self.total_steps = folder / METRICS, stage, total_steps
        self.every, self.quiet, self.main = max(every, 1), quiet, main
        self.trackers = list(trackers)
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._window: list[Mapping[str, float]] = []
        self._started = self._first_done = time.monotonic()
        self._steps_here = 0

    @property
    def wandb_id(self) -> str | None:
        """The id of the W&B run, under which a resumed run goes on."""
        return next((tracker.id for tracker in self.trackers if isinstance(tracker, Wandb)), None)

    def resume(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after `step` and a half-written last one (−1 drops all); returns the last training
        records that stay, for the guards. Call once at the start."""
        if not self.main or not self.path.exists():
            return []
        kept, last = [], deque(maxlen=WINDOW)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                # The process was killed while it wrote this line.
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
                if record["kind"] == "train":
                    last.append(record)
        with atomic(self.path) as aside:
            aside.write_text("".join(kept), encoding="utf-8")
        return list(last)

    def train(self, step: int, record: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        """Records one finished step; `step` counts from 1 (steps done)."""
        if not self.main:
            return
        now = time.monotonic()
        self._steps_here += 1
        if self._steps_here == 1:
            self._first_done = now
            # On a terminal the bar fills the time between two lines; in a log the lines themselves do.
            hidden = self.quiet or not sys.stderr.isatty()
            self._progress = Progress(self.total_steps - step + 1, self.stage, "step", quiet=hidden)
        self._write(step, "train", record)
        self._progress.update()
        self._window.append(record)
        for warning in warnings:
            self._print(f"warning: {warning}", sys.stderr)
        if self._steps_here == 1 or step % self.every == 0 or step == self.total_steps:
            self._say(step, train_words(self._window) + [self._eta(step, now)])
            self._window.clear()

    def val(self, step: int, record: Mapping[str, float], media: Mapping[str, Path] | None = None) -> None:
        """Records a validation ("val/loss", "val/psnr", ...) made after `step` steps, and what it shows."""
        if not self.main:
            return
        self._write(step, "val", record)
        for name, path in (media or {}).items():
            self._tell("media", step, f"{self.stage}/{name}", path)
        self._say(
            step, ["val", *(f"{_last(k)} {_number(v)}" for k, v in record.items() if k.startswith("val/"))]
        )

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends the bar, the file and the trackers."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        if self._file is not None:
            self._file.close()
        self._tell("close")
        self._progress = self._file = None
        self.trackers = []

    def _write(self, step: int, kind: str, record: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "stage": self.stage, "kind": kind, **record}) + "\n"
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make room or make it writable, then the "
                "same command goes on from the last checkpoint"
            ) from error
        self._tell("log", step, {f"{self.stage}/{name}": value for name, value in record.items()})

    def _tell(self, method: str, *what: Any) -> None:
        """To every tracker. One that fails is given up: a server far away must not end a training."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*what)
            except Exception as error:  # whatever the package raises
                self.trackers.remove(tracker)
                name = type(tracker).__name__
                print(f"{name} failed ({error}): going on without it, metrics.jsonl has all", file=sys.stderr)

    def _say(self, step: int, words: list[str]) -> None:
        width = len(str(self.total_steps))
        line = "  ".join([f"{self.stage:<7}", f"step {step:{width}d}/{self.total_steps}", *words])
        self._print(line, sys.stdout)

    def _print(self, line: str, file: IO[str]) -> None:
        if self.quiet:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(line, file=file)
        else:
            print(line, file=file, flush=True)

    def _eta(self, step: int, now: float) -> str:
        if step >= self.total_steps:
            return f"took {_clock(now - self._started)}"
        # The first step comes after data and validation, and it may compile: it tells nothing of the others.
        timed = self._steps_here - 1
        if not timed:
            return "ETA -"
        per_step = (now - self._first_done) / timed
        return f"ETA {_clock(per_step * (self.total_steps - step))}"


def of_all_ranks(world: World, waited: float, damaged: int) -> dict[str, float]:
    """What every rank tells of a step, in one small sum on the CPU: the longest wait for data in seconds, the
    number of damaged clips, the largest peaks of memory in bytes (device: allocated; on a CPU the host's)."""
    table = torch.zeros(world.size, 4, dtype=torch.float64)
    table[world.rank] = torch.tensor([waited, damaged, *peak_memory_bytes()], dtype=torch.float64)
    wait, clips, device, host = world.all_reduce_sum(table).T
    return {
        "data_seconds": wait.max().item(),
        "data_damaged": int(clips.sum()),
        "peak_memory_bytes": int(device.max()),
        "peak_host_bytes": int(host.max()),
    }


def peak_memory_bytes() -> tuple[int, int]:
    """Peak memory of this process: on its device (on a CPU the host's) and resident on the host."""
    host = peak_rss_bytes()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(), host
    return host, host


def train_words(window: Sequence[Mapping[str, float]]) -> list[str]:
    """The columns of a console line: means over the steps since the last one, rates over their whole time."""
    values: dict[str, list[float]] = {}
    for record in window:
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    mean = {name: sum(v) / len(v) for name, v in values.items()}
    words = [f"{_last(name)} {_number(v)}" for name, v in mean.items() if name.startswith("loss/")]
    norms = [f"{_last(name)} {_number(v)}" for name, v in mean.items() if name.startswith("grad_norm/")]
    if norms:
        words.append("|g| " + " ".join(norms))
    if "lr" in values:
        words.append(f"lr {values['lr'][-1]:.1e}")
    if seconds := sum(values.get("seconds", [])):
        if "samples" in values:
            words.append(f"{sum(values['samples']) / seconds:6.2f} samples/s")
        if "tokens" in values:
            words.append(f"{sum(values['tokens']) / seconds:.0f} tokens/s")
        for name in ("mfu", "hfu"):
            if name in values:  # shares of time: the mean over steps weighs each with its own
                share = sum(r[name] * r["seconds"] for r in window) / seconds
                words.append(f"{name.upper()} {100 * share:.1f}%")
        if "data_seconds" in values:
            words.append(f"wait {100 * sum(values['data_seconds']) / seconds:2.0f}%")
    if damaged := sum(values.get("data_damaged", [])):
        words.append(f"{damaged:.0f} damaged clips")
    device, host = values["peak_memory_bytes"][-1], values["peak_host_bytes"][-1]
    words.append(f"{device / 1e9:.1f} GB" + (f", host {host / 1e9:.1f} GB" if host != device else ""))
    return words


def _last(name: str) -> str:
    return name.split("/", 1)[1]


def _number(value: float) -> str:
    return f"{value:<6.4g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:<6.1e}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
