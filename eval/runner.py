"""Runs every method over every clip and scores what comes out, a few frames at a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch

from eval.baselines import Bicubic
from eval.datasets import Pair, TestSet
from eval.methods import Method, Upscaler, open_method
from eval.metrics import Lpips, psnr_per_frame, ssim_per_frame
from flashvsr.base.cli import Progress, UserError

TOGETHER = 8  # LR frames in one push: what a streaming model takes at once


@dataclass(frozen=True)
class Score:
    """One method on one clip: means over its frames; `seconds_per_frame` is None for finished outputs."""

    method: str
    clip: str
    frames: int
    psnr: float
    ssim: float
    lpips: float
    seconds_per_frame: float | None


@dataclass(frozen=True)
class Panel:
    """The same frame of one clip seen by everyone: label to uint8 `H W 3`, LR enlarged without smoothing."""

    clip: str
    frame: int
    pictures: dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gives; `in_use` is what each method says of itself (decoder, precision...)."""

    scores: list[Score] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    in_use: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(
    methods: Sequence[Method],
    test_set: TestSet,
    lpips: Lpips,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    panels: int = 2,
    quiet: bool = False,
) -> Outcome:
    """Score all methods on all pairs, and keep the middle frame of the first `panels` clips.

    Models and metrics run on `device`. Raises UserError when an output differs from its GT in frame count or
    size, naming the method and the clip.
    """
    outcome = Outcome()
    for method in methods:
        outcome.in_use[method.name] = _try_out(method, test_set, device, dtype)
    shown = [pair.name for pair in test_set.pairs[:panels]]
    pictures: dict[str, dict[str, np.ndarray]] = {name: {} for name in shown}
    lpips = lpips.to(device)
    frames = len(methods) * sum(pair.frames for pair in test_set.pairs)
    with Progress(frames, "evaluate", unit="frame", quiet=quiet) as progress:
        for method in methods:
            start = open_method(method, test_set, device, dtype)
            for pair in test_set.pairs:
                score, picture = run_clip(method, start(pair), pair, lpips)
                outcome.scores.append(score)
                if pair.name in shown:
                    pictures[pair.name][method.name] = picture
                progress.update(pair.frames, method=method.name, clip=pair.name, psnr=score.psnr)
    for pair in test_set.pairs[:panels]:
        outcome.panels.append(_panel(pair, pictures[pair.name], test_set.scale))
    return outcome


def _try_out(method: Method, test_set: TestSet, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Open a method and drop it again, so that mistakes in the last are found before the first has run."""
    start = open_method(method, test_set, device, dtype)
    started = [start(pair) for pair in test_set.pairs]
    return getattr(started[0], "in_use", {})  # all a method must have is push and flush


def run_clip(method: Method, upscaler: Upscaler, pair: Pair, lpips: Lpips) -> tuple[Score, np.ndarray]:
    """Upscale one clip, scoring frames as they come; returns the score and the middle frame, uint8 `H W 3`.

    Time is the wall clock of push and flush alone, until the frames are in the host's memory.
    """
    device = next(lpips.parameters()).device
    reference = pair.read_gt()
    values: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    done, seconds, middle = 0, 0.0, None
    for stack in _then_none(pair.read_lq(TOGETHER)):
        begin = time.perf_counter()
        out = torch.as_tensor(upscaler.flush() if stack is None else upscaler.push(stack)).cpu()
        seconds += time.perf_counter() - begin
        if len(out) == 0:
            continue
        gt = list(islice(reference, len(out)))
        done += len(out)
        if len(gt) < len(out) or out.shape[1:] != gt[0].shape:
            _mismatch(method, pair, done, out)
        wanted = pair.frames // 2 - (done - len(out))
        if 0 <= wanted < len(out):
            middle = out[wanted].numpy().copy()
        a, b = out.to(device), torch.from_numpy(np.stack(gt)).to(device)
        values["psnr"].append(psnr_per_frame(a, b))
        values["ssim"].append(ssim_per_frame(a, b))
        values["lpips"].append(lpips.per_frame(a, b))
    if done != pair.frames or middle is None:
        _mismatch(method, pair, done, None)
    means = {name: torch.cat(parts).mean().item() for name, parts in values.items()}
    timed = None if method.kind == "outputs" else seconds / done
    return Score(method.name, pair.name, done, **means, seconds_per_frame=timed), middle


def _then_none(stacks):
    yield from stacks
    yield None


def _mismatch(method: Method, pair: Pair, done: int, out: torch.Tensor | None) -> NoReturn:
    if out is not None and done <= pair.frames:
        size = f"{out.shape[2]}x{out.shape[1]}" if out.ndim == 4 else f"shape {tuple(out.shape)}"
        raise UserError(
            f"method {method.name!r}: clip {pair.name!r} came out {size}, GT is {pair.width}x{pair.height}"
        )
    least = "at least " if done > pair.frames else ""
    raise UserError(
        f"method {method.name!r}: clip {pair.name!r} has {least}{done} output frames, GT has {pair.frames}"
    )


def _panel(pair: Pair, outputs: dict[str, np.ndarray], scale: int) -> Panel:
    index = pair.frames // 2
    lr = next(islice((frame for stack in pair.read_lq(TOGETHER) for frame in stack), index, None))
    gt = next(islice(pair.read_gt(), index, None))
    pictures = {"LR": lr.repeat(scale, axis=0).repeat(scale, axis=1)}
    if "bicubic" not in outputs:
        pictures["bicubic"] = Bicubic(scale).push(lr[None])[0].numpy()
    return Panel(pair.name, index, {**pictures, **outputs, "HR": gt})
