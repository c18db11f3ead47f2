"""The whole streaming pipeline: frames in, frames out, per second, and where the time goes."""

from __future__ import annotations

import numpy as np
import torch

from flashvsr import flops
from flashvsr.attention.plans import training_ratio
from flashvsr.base import measure
from flashvsr.bench.models import FIRST_FRAMES, STEP_FRAMES, Subject
from flashvsr.bench.modules import KINDS
from flashvsr.bench.report import Report, Row, begin
from flashvsr.streaming import stream as streaming
from flashvsr.streaming.frames import Canvas
from flashvsr.streaming.stream import STEP_LATENTS
from flashvsr.streaming.upscaler import StreamingUpscaler
from flashvsr.weights.folder import FlashVSR

SCALE = 4


def running(model: FlashVSR, subject: Subject, **settings) -> tuple[StreamingUpscaler, np.ndarray]:
    """An upscaler after its first call, and the eight LR frames of any later one."""
    upscaler = StreamingUpscaler(model, scale=SCALE, decoder="tc", **settings)
    low = (subject.size[0] // SCALE, subject.size[1] // SCALE)
    frames = np.random.default_rng(0).integers(0, 256, (FIRST_FRAMES, *low, 3), np.uint8)
    upscaler.push(frames)
    return upscaler, frames[:STEP_FRAMES]


def step_work(subject: Subject, model: FlashVSR) -> dict[str, int]:
    """Useful work of one step, by part, without a local window (at these sizes it forbids little)."""
    config, (height, width) = model.config, subject.size
    ratio = training_ratio(model.info.sparse_ratio, model.info.area, height, width)
    grid = (STEP_LATENTS, *subject.grid)
    pairs = flops.step_pairs(config.dit, grid, ratio=ratio, past=3)
    sizes = {"height": height, "width": width}
    tokens = STEP_LATENTS * subject.grid[0] * subject.grid[1]
    projector = flops.projector(config.lr_projector, frames=STEP_FRAMES, start=False, **sizes)
    return {
        "projector": projector.forward,
        "DiT": flops.dit(config.dit, tokens=tokens, pairs=pairs).forward,
        "decoder": flops.tc_decoder(config.tc_decoder, latents=STEP_LATENTS, **sizes).forward,
    }


def bench_pipeline(
    subject: Subject,
    *,
    model: FlashVSR | None = None,
    attention: str = "auto",
    repeats: int = 5,
    profile: bool = False,
    title: str = "pipeline, one step of 8 frames",
) -> Report:
    """Frames per second of a running stream (LR frames to uint8 frames on the CPU), and time per part."""
    model = model or subject.model("dit", "lr_projector", "tc_decoder")
    upscaler, frames = running(model, subject, attention=attention)
    report = begin(title, subject.device, subject.dtype, **subject.facts())
    report.facts["attention"] = upscaler.in_use["attention"]

    def step() -> np.ndarray:
        return upscaler.push(frames)

    work = step_work(subject, model)
    seconds = measure.time_median(step, repeats)
    peak = measure.peak_bytes(step, subject.device)
    report.rows.append(
        Row("step", seconds, sum(work.values()), peak, note=f"{STEP_FRAMES / seconds:.2f} FPS")
    )
    parts = measure.split(
        step,
        {
            "upsampling": (Canvas, "place"),
            "projector": (model.lr_projector, "forward"),
            "DiT": (model.dit, "forward"),
            "decoder": (model.tc_decoder, "forward"),
            "colour fix": (streaming, "correct"),
            "to uint8 on the CPU": (Canvas, "take"),
        },
        repeats,
    )
    total = parts.pop("all")
    for name, spent in parts.items():
        report.rows.append(Row(name, spent, work.get(name), note=f"{spent / total:.0%}"))
    report.extra = {"fps": STEP_FRAMES / seconds, "peak_bytes": peak}
    if subject.device.type == "cuda":
        held = torch.cuda.max_memory_allocated(subject.device)
        report.extra["allocated_bytes"] = held
        report.facts["allocated at most"] = f"{held / 2**30:.1f} GiB"
    if profile:
        report.extra["shares"], report.extra["others"] = measure.shares(step, KINDS, subject.device)
    return report
