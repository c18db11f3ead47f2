"""Scoring one clip by several metrics at once, in memory that does not grow with the clip.

A metric is a function of a few frames and the frames before them; frames are converted once for all metrics:

    suite = metrics_for(["psnr", "ssim_y", "lpips", "chunk_edge"], device="cuda")
    clip = suite.start()
    for sr, hr in stacks:
        clip.push(sr, hr)
    values = clip.finish()          # {"psnr": Values(...), ...}
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frames import Stack
from flashvsr.base.cli import UserError
from flashvsr.base.resize import bicubic_8bit

# Frames handled together: one on a CPU, whose caches are small; on a GPU as many as make up this area.
_AREA = 2**22


@dataclass(frozen=True)
class Frames:
    """The same few frames of SR, of HR, and of LQ enlarged to their size; `lq` only where there is no HR."""

    sr: Stack
    hr: Stack | None
    lq: Stack | None


@dataclass(frozen=True)
class Values:
    """What a metric says of a clip.

    `per_frame` is float64 on the CPU, one value per frame from frame `first` on: `first` is 1 where a frame
    is compared with the one before it. It is empty for a metric of whole clips. `clip` is None, and `reason`
    says why in one sentence, where the metric is not defined: a temporal metric of a single frame, a ratio to
    a change of zero. With a value, `reason` names the frames that were left out.
    """

    per_frame: Tensor
    clip: float | None
    first: int = 0
    reason: str = ""


def mean(rows: Tensor) -> Values:
    """The usual clip value: the mean over frames, `n` -> Values."""
    return Values(rows, rows.mean().item())


@dataclass(frozen=True)
class Metric:
    """One number per clip, and where it makes sense per frame.

    `key` names it in files, `title` in tables; `higher` says whether more is better, None that the best is
    to be near `ideal`; `digits` are the decimals a table shows; `description` is implementation, version and
    colour space. `measure` turns frames into rows, `n ...` on any device, of a temporal metric one fewer at
    the start of a clip; `gather` turns the rows of the whole clip, on the CPU, into its Values.
    `least` is the smallest side of a frame in pixels, after the crop.
    """

    key: str
    title: str
    higher: bool | None
    digits: int
    description: str
    measure: Callable[[Frames], Tensor]
    gather: Callable[[Tensor], Values] = mean
    needs_gt: bool = True
    least: int = 1
    ideal: float | None = None

    def rank(self, value: float) -> float:
        """A number that is smaller where `value` is better."""
        if self.higher is None:
            return abs(value - self.ideal)
        return -value if self.higher else value


@dataclass(frozen=True)
class Suite:
    """The metrics of an evaluation, the border cropped off every frame before all of them, the device."""

    metrics: tuple[Metric, ...]
    crop: int = 0
    device: str | torch.device = "cpu"

    def start(self) -> "Scoring":
        return Scoring(self)

    def without_gt(self) -> "Suite":
        """The metrics that a test set without GT allows."""
        return Suite(tuple(m for m in self.metrics if not m.needs_gt), self.crop, self.device)


class Scoring:
    """One clip on its way through all metrics of a suite; `frames` counts those pushed.

    Only the last few frames are kept (and what metrics make of them), so memory does not grow with the clip.
    On a CPU any split of the clip into pushes gives the same numbers; on a GPU they may differ by rounding.
    """

    def __init__(self, suite: Suite):
        self.suite = suite
        self.frames = 0
        # Metrics may share a measure, whose rows are then made once.
        self._rows: dict[Callable, list[Tensor]] = {metric.measure: [] for metric in suite.metrics}
        self._last: Frames | None = None

    @torch.no_grad()
    def push(
        self,
        sr: np.ndarray | Tensor,
        hr: np.ndarray | Tensor | None = None,
        lq: np.ndarray | Tensor | None = None,
    ) -> None:
        """Score the next frames: uint8 RGB `n H W 3`, HR of SR's shape, LQ of any size.

        LQ is looked at only where there is no HR, by metrics that follow motion. Raises UserError where
        shapes do not fit, a metric needs HR that is not there, or frames are too small for a metric.
        """
        stacks = {"sr": torch.as_tensor(sr)}
        if hr is not None:
            stacks["hr"] = torch.as_tensor(hr)
        elif lq is not None:
            stacks["lq"] = torch.as_tensor(lq)
        self._check(stacks)
        together = _together(self.suite.device, sr.shape[1] * sr.shape[2])
        with _full_precision(self.suite.device):
            for at in range(0, len(sr), together):
                self._measure({k: self._fitted(v[at : at + together], sr) for k, v in stacks.items()})

    def finish(self) -> dict[str, Values]:
        """Every metric's Values, by key. Raises UserError where no frame was pushed."""
        if self.frames == 0:
            raise UserError("this clip has no frames to score")
        rows = {measure: torch.cat(parts).cpu() for measure, parts in self._rows.items()}
        return {metric.key: metric.gather(rows[metric.measure]) for metric in self.suite.metrics}

    def _fitted(self, pixels: Tensor, sr: np.ndarray | Tensor) -> Tensor:
        """On the device, at SR's size (only LQ has another), without the border."""
        pixels = pixels.to(self.suite.device)
        if pixels.shape[1:] != sr.shape[1:]:
            pixels = bicubic_8bit(pixels.movedim(-1, 1), tuple(sr.shape[1:3])).movedim(1, -1)
        crop = self.suite.crop
        return pixels[:, crop:-crop, crop:-crop] if crop else pixels

    def _measure(self, pixels: dict[str, Tensor]) -> None:
        stacks = {}
        for name in ("sr", "hr", "lq"):
            before = getattr(self._last, name) if self._last else None
            if before is not None:
                before.before = None  # one stack back is as far as any metric looks
            stacks[name] = Stack(pixels[name], before) if name in pixels else None
        frames = Frames(**stacks)
        for measure, parts in self._rows.items():
            parts.append(measure(frames))
        self.frames += len(frames.sr.pixels)
        self._last = frames

    def _check(self, stacks: dict[str, Tensor]) -> None:
        sr = stacks["sr"]
        for name, frames in stacks.items():
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
                shape = tuple(frames.shape)
                raise UserError(f"metrics take uint8 frames shaped n H W 3, {name} is {frames.dtype} {shape}")
            if len(frames) != len(sr):
                raise UserError(f"metrics got {len(sr)} frames of sr and {len(frames)} of {name}")
        if "hr" in stacks and stacks["hr"].shape != sr.shape:
            raise UserError(f"output is {_size(sr)}, its GT is {_size(stacks['hr'])}")
        had = {name for name in ("hr", "lq") if self._last and getattr(self._last, name)}
        if self._last and had != set(stacks) - {"sr"}:
            raise UserError("every push of a clip brings HR or none does, and likewise LQ")
        side = min(sr.shape[1:3]) - 2 * self.suite.crop
        for metric in self.suite.metrics:
            if metric.needs_gt and "hr" not in stacks:
                raise UserError(f"{metric.key} compares with GT frames, and this clip has none")
            if side < metric.least:
                cropped = f" without a border of {self.suite.crop}" if self.suite.crop else ""
                raise UserError(
                    f"{metric.key} needs frames of at least {metric.least}x{metric.least} pixels, "
                    f"these are {_size(sr)}{cropped}"
                )


@contextmanager
def _full_precision(device: str | torch.device) -> Iterator[None]:
    """float32 as such: no autocast of the caller's, no TF32 in convolutions, so that devices agree."""
    cudnn = torch.backends.cudnn
    same = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with (
        torch.autocast(torch.device(device).type, enabled=False),
        cudnn.flags(enabled=cudnn.enabled, allow_tf32=False, **same),
    ):
        yield


def _together(device: str | torch.device, area: int) -> int:
    """How many frames of `area` pixels are handled at once."""
    return 1 if torch.device(device).type == "cpu" else max(1, _AREA // area)


def _size(frames: Tensor) -> str:
    return f"{frames.shape[2]}x{frames.shape[1]}"
