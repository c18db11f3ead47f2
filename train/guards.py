"""Guard rails: what looks wrong while a run goes on is said once, and what is broken ends it.

Spikes and waiting are judged by robust statistics of the last steps; a warning of a kind is not repeated for
`SILENCE` steps. A value that is not finite ends the run on every rank, with what is needed to look into it.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flashvsr.base.cli import UserError
from train import checkpoint
from train.launch import World

WINDOW = 100  # steps that a value is compared with
SILENCE = 100  # steps without another warning of the same kind
SPIKE_FROM = 20  # steps: before that, losses fall too fast to know what is usual
SPIKE = 10.0  # times the usual distance from the median
STARVED, STARVED_STEPS = 0.3, 20  # share of the time spent waiting for data, over so many steps
DAMAGED = 0.01  # share of clips


class Guards:
    """Watches the records of the steps, in order; a resumed run shows it the last ones again."""

    def __init__(self, workers: int):
        self.workers = workers
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._times: deque[tuple[float, float]] = deque(maxlen=STARVED_STEPS)
        self._clips: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._said: dict[str, int] = {}
        self._first = True

    def look(self, step: int, record: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """A step's record -> what to add to it ("spike/<term>": how many usual distances above the median),
        and warnings to print."""
        marks = {}
        for name, value in record.items():
            if name.startswith("loss/"):
                distance = spike(self._losses[name], value)
                if distance > SPIKE:
                    marks[f"spike/{name.removeprefix('loss/')}"] = distance
                self._losses[name].append(value)
        warnings = []
        if marks and self._may_say("spike", step):
            terms = ", ".join(
                f"{term.removeprefix('spike/')} {record['loss/' + term.removeprefix('spike/')]:.4g}"
                for term in marks
            )
            warnings.append(
                f"loss spike at step {step}: {terms}, far above the last {WINDOW} steps; if it stays, lower "
                "optim.lr or optim.clip, or go back to an earlier checkpoint"
            )
        return marks, warnings + self._starving(step, record) + self._damaged(step, record)

    def _starving(self, step: int, record: Mapping[str, float]) -> list[str]:
        if self._first or "data_seconds" not in record:  # the first step waits for workers to start
            self._first = False
            return []
        self._times.append((record["data_seconds"], record["seconds"]))
        waited, seconds = map(sum, zip(*self._times, strict=True))
        if len(self._times) < STARVED_STEPS or waited <= STARVED * seconds or not self._may_say("wait", step):
            return []
        return [
            f"starving: {waited / seconds:.0%} of the last {STARVED_STEPS} steps went into waiting for data; "
            f"raise data.workers (now {self.workers}), or give data.slots with data.latents=auto: then clips "
            "are decoded, degraded and encoded once"
        ]

    def _damaged(self, step: int, record: Mapping[str, float]) -> list[str]:
        if "data_damaged" not in record:
            return []
        self._clips.append((record["data_damaged"], record["samples"]))
        damaged, clips = map(sum, zip(*self._clips, strict=True))
        if damaged < 2 or damaged <= DAMAGED * clips or not self._may_say("damaged", step):
            return []
        return [
            f"{damaged:.0f} of the last {clips:.0f} clips were damaged and replaced by others (named above); "
            "`python -m data inspect` tells which shards to make again"
        ]

    def _may_say(self, kind: str, step: int) -> bool:
        if step - self._said.get(kind, -SILENCE) < SILENCE:
            return False
        self._said[kind] = step
        return True


def spike(before: Sequence[float], value: float) -> float:
    """How far `value` lies above the median of `before`, in units of 1.4826 times their median absolute
    deviation (the standard deviation, were they normal); 0 while they are few, or below twice the median."""
    if len(before) < SPIKE_FROM:
        return 0.0
    middle = statistics.median(before)
    if value <= 2 * middle:
        return 0.0
    spread = 1.4826 * statistics.median(abs(x - middle) for x in before)
    return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)


def stop_broken(
    what: str, step: int, micros: Sequence[Mapping[str, Any]], world: World, checkpoints: Path
) -> None:
    """Ends the run with exit code 2: `what` is not finite at step `step` (from 1). All ranks call it.

    Raises:
        UserError: in a run of one process; with the samples of the step and the last good checkpoint.
        SystemExit: with more, after the main rank has said the same of the samples of all.
    """
    own = [str(i) for micro in micros for i in micro["ids"]]
    ids: list[list[str]] = [own]
    if world.size > 1:
        ids = [[] for _ in range(world.size)]
        dist.all_gather_object(ids, own)
    last = checkpoint.latest(checkpoints) if world.is_main else None
    sentence = (
        f"{what} is not finite at step {step} (samples {', '.join(i for some in ids for i in some)}); "
        + (f"the last good checkpoint is {last}" if last else "there is no checkpoint yet")
        + ": lower optim.lr or look at these samples"
    )
    if world.size == 1:
        raise UserError(sentence)
    if world.is_main:  # said before any rank ends: the launcher then ends all others
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    world.barrier()
    raise SystemExit(2)
