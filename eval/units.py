"""What an evaluation is made of: a unit (a method on a clip), what it follows from and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.cache import Cache, Output, code_hash, digest, files_hash
from eval.datasets import Clip, TestSet
from eval.methods import Method
from eval.metrics import Lpips
from eval.metrics.catalogue import metrics_for
from eval.metrics.scoring import Metric, Suite
from flashvsr.base.cli import UserError

DEFAULT_METRICS = ("psnr", "ssim", "lpips", "tdiff", "niqe")


@dataclass(frozen=True)
class MetricChoice:
    """Which metrics; every process builds its own suite from it."""

    names: tuple[str, ...] = DEFAULT_METRICS
    crop: int = 0
    lpips_net: str = "alex"
    lpips_weights: str = "auto"
    flow: str = "lk"
    dover: str | None = None

    def suite(self, device: str = "cpu") -> Suite:
        lpips = None
        if {"lpips", "tlpips"} & set(self.names):
            lpips = Lpips(self.lpips_net, self.lpips_weights)
        return metrics_for(
            self.names, crop=self.crop, device=device, lpips=lpips, flow=self.flow, dover=self.dover
        )

    def files(self) -> dict[str, str]:
        """Hashes of the weights' files that were given."""
        given = [path for path in (self.lpips_weights, self.dover) if path and Path(path).is_file()]
        return {path: files_hash([Path(path)]) for path in given}


@dataclass(frozen=True)
class Unit:
    """A method on a clip. `key` names the output in the cache, or `made` is the finished one; `inputs` are
    the hashes of LQ and GT."""

    method: Method
    test_set: TestSet
    clip: Clip
    inputs: tuple[str, str | None]
    key: str = ""
    made: Output | None = None


@dataclass(frozen=True)
class Fit:
    """The part of an output that is scored, and what was cut for it."""

    frames: int
    height: int
    width: int
    note: str


def fitted(unit: Unit, output: Output, align: str) -> Fit:
    """How an output fits its clip; UserError, naming both, where it does not and `align` is no help."""
    clip, who = unit.clip, f"method {unit.method.name!r}: clip {unit.clip.name!r}"
    goal = "GT has" if clip.gt is not None else "its LQ makes"
    if align == "refuse" and output.frames not in (clip.frames, clip.total):
        raise UserError(f"{who} has {output.frames} output frames, {goal} {clip.frames}")
    notes = [clip.note] if clip.note else []
    frames = min(clip.frames, output.frames)
    if frames < clip.frames:
        notes.append(f"first {frames} of {clip.frames} frames")
    size = output.height, output.width
    if size != (clip.height, clip.width):
        if align in ("refuse", "first"):
            raise UserError(
                f"{who} came out {output.width}x{output.height}, "
                f"{'GT is' if clip.gt is not None else 'its LQ makes'} {clip.width}x{clip.height}"
                f" (--align top-left or center cuts to what both have)"
            )
        size = min(size[0], clip.height), min(size[1], clip.width)
        notes.append(f"output {output.width}x{output.height} scored on {size[1]}x{size[0]}, {align}")
    return Fit(frames, *size, "; ".join(notes))


@dataclass(frozen=True)
class Job:
    """What every worker must know; `prints` are the fingerprints of the metrics, in the order of columns."""

    cache: Cache
    choice: MetricChoice
    prints: dict[str, Any]
    needs_gt: dict[str, bool]
    align: str = "refuse"
    dtype: torch.dtype = torch.float32

    def wanted(self, clip: Clip) -> list[str]:
        """Keys of the metrics that the clip allows."""
        return [key for key, needed in self.needs_gt.items() if clip.gt is not None or not needed]

    def score_key(self, unit: Unit, output: Output, metric: str) -> str:
        """The name of a metric's values of an output: all they follow from."""
        fit = fitted(unit, output, self.align)
        lq, gt = unit.inputs
        return digest(
            {
                "output": output.pixels,
                "window": [fit.frames, fit.height, fit.width, self.align],
                "beside": [gt] if gt else ["lq", lq],
                "metric": self.prints[metric],
            }
        )

    def missing(self, unit: Unit) -> tuple[Output | None, list[str]]:
        """What is there of a unit's output, and the keys of the metrics still to be measured."""
        output = unit.made or self.cache.output(unit.key)
        keys = self.wanted(unit.clip)
        if output is None:
            return None, keys
        return output, [k for k in keys if self.cache.score(self.score_key(unit, output, k)) is None]


def job_for(
    choice: MetricChoice, cache: Cache, align: str, dtype: torch.dtype, devices: Sequence[str]
) -> tuple[Job, tuple[Metric, ...]]:
    """A Job and the metrics it is about."""
    suite = choice.suite()
    common = {
        "code": code_hash("eval/metrics"),
        "torch": torch.__version__,
        "device": torch.device(devices[0]).type,
        "crop": choice.crop,
        "weights": sorted(choice.files().values()),
    }
    prints = {m.key: {"key": m.key, "description": m.description, **common} for m in suite.metrics}
    needs_gt = {m.key: m.needs_gt for m in suite.metrics}
    return Job(cache, choice, prints, needs_gt, align, dtype), suite.metrics
