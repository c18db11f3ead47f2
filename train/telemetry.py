"""What a run tells while it runs: `metrics.jsonl` first, then a console line, then W&B when asked.

metrics.jsonl is the source of truth: one JSON object a line with "step", "stage", "kind" ("train" or "val")
and numbers. A train record may hold "loss/<term>", "grad_norm/<role>", "lr", "counter" and more; the
console's rates come from its raw timing: "seconds" (the whole step), "data_seconds" (of it, waiting for
the loader) and "samples" (of all ranks).
"""

from __future__ import annotations

import json
import netrc
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from flashvsr.base.cli import Progress, UserError
from flashvsr.base.files import atomic
from flashvsr.base.measure import peak_rss_bytes

METRICS = "metrics.jsonl"


class Telemetry:
    """The voice of one stage of a run; a no-op on every rank but the main one.

    `wandb` holds arguments of `wandb.init` ("project", "name", "id", "config", ...), or None for no W&B.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        total_steps: int,
        *,
        every: int = 10,
        quiet: bool = False,
        wandb: Mapping[str, Any] | None = None,
        main: bool = True,
    ) -> None:
        self.path, self.stage, self.total_steps = folder / METRICS, stage, total_steps
        self.every, self.quiet, self.main = max(every, 1), quiet, main
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._window: list[dict[str, float]] = []
        self._started = self._first_done = time.monotonic()
        self._steps_here = 0
        self._wandb = _start_wandb(wandb, folder) if wandb is not None and main else None

    @property
    def wandb_id(self) -> str | None:
        """The id of the W&B run: a resumed run goes on under it when `wandb["id"]` holds it."""
        return self._wandb.id if self._wandb else None

    def truncate(self, step: int) -> None:
        """Drops the lines after `step` and a half-written last one; −1 drops all. Call once at the start."""
        if not self.main or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                # The process was killed while it wrote this line.
                continue
        with atomic(self.path) as aside:
            aside.write_text("".join(kept), encoding="utf-8")

    def train(self, step: int, record: Mapping[str, float]) -> None:
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
        record = {**record, "peak_memory_bytes": peak_memory_bytes()}
        self._write(step, "train", record)
        self._progress.update()
        self._window.append(record)
        if self._steps_here == 1 or step % self.every == 0 or step == self.total_steps:
            self._say(step, _train_words(self._window) + [self._eta(step, now)])
            self._window.clear()

    def val(self, step: int, record: Mapping[str, float]) -> None:
        """Records a validation ("val/loss", "val/psnr", ...) made after `step` steps."""
        if not self.main:
            return
        self._write(step, "val", record)
        self._say(
            step, ["val", *(f"{_last(k)} {_number(v)}" for k, v in record.items() if k.startswith("val/"))]
        )

    def close(self) -> None:
        """Ends the bar, the file and the W&B run."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._progress = self._file = self._wandb = None

    def _write(self, step: int, kind: str, record: Mapping[str, float]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, "stage": self.stage, "kind": kind, **record}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({f"{self.stage}/{name}": value for name, value in record.items()}, step=step)

    def _say(self, step: int, words: list[str]) -> None:
        if self.quiet:
            return
        width = len(str(self.total_steps))
        line = "  ".join([f"{self.stage:<7}", f"step {step:{width}d}/{self.total_steps}", *words])
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(line)
        else:
            print(line, flush=True)

    def _eta(self, step: int, now: float) -> str:
        if step >= self.total_steps:
            return f"took {_clock(now - self._started)}"
        # The first step comes after data and validation, and it may compile: it tells nothing of the others.
        timed = self._steps_here - 1
        if not timed:
            return "ETA -"
        per_step = (now - self._first_done) / timed
        return f"ETA {_clock(per_step * (self.total_steps - step))}"


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU once one is in use, else resident on the host."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_rss_bytes()


def _train_words(window: list[dict[str, float]]) -> list[str]:
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
        if "data_seconds" in values:
            words.append(f"wait {100 * sum(values['data_seconds']) / seconds:2.0f}%")
    if damaged := sum(values.get("data_damaged", [])):
        words.append(f"{damaged:.0f} damaged clips")
    words.append(f"{values['peak_memory_bytes'][-1] / 1e9:.1f} GB")
    return words


def _start_wandb(arguments: Mapping[str, Any], folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("W&B logging was asked for, but wandb is not installed: pip install wandb") from error
    folder.mkdir(parents=True, exist_ok=True)
    offline = {} if _has_key() else {"mode": "offline"}
    return wandb.init(**{"resume": "allow", "dir": str(folder), **offline, **arguments})


def _has_key() -> bool:
    """Whether `wandb login` was done here or a key stands in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _last(name: str) -> str:
    return name.split("/", 1)[1]


def _number(value: float) -> str:
    return f"{value:<6.4g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:<6.1e}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
