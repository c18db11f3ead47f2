"""A file upscaled into a file, as the command does it: what working beside one another saves, and memory over
time."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashvsr.base import measure
from flashvsr.base.footage import Footage, Moment
from flashvsr.base.page import Page
from flashvsr.base.video_writer import VideoWriter
from flashvsr.bench.latency import watched
from flashvsr.bench.report import MIB, Report, Row, begin
from flashvsr.streaming import job
from flashvsr.streaming.beside import worthwhile
from flashvsr.streaming.upscaler import StreamingUpscaler
from flashvsr.weights.folder import FlashVSR

FIRST = 100  # frames after which memory may grow no more
WAYS = {  # threads for reading and writing; the decoder beside the DiT
    "one after the other": (False, False),
    "reader and writer in threads": (True, False),
    "and the decoder beside the DiT": (True, True),
}


def write_clip(path: Path, frames: np.ndarray) -> str:
    """A video of uint8 `F h w 3` to measure with."""
    with VideoWriter(path, 25, *frames.shape[1:3]) as writer:
        writer.write(frames)
    return str(path)


def upscale_file(
    method: StreamingUpscaler,
    clip: str,
    out: Path,
    frames: int | None,
    *,
    overlap: bool = True,
    on_frames: Callable[[int], Any] | None = None,
) -> job.Done:
    """`job.upscale` of the first `frames` of a clip (None: all)."""
    footage = Footage(clip, end=None if frames is None else Moment.parse(f"{frames}f"))
    size = method.output.size(footage.height, footage.width)
    return job.upscale(footage, method, size, job.Target(str(out)), overlap=overlap, on_frames=on_frames)


def bench_overlap(
    model: FlashVSR, clip: str, *, frames: int, repeats: int = 3, facts: dict[str, Any] | None = None,
    **settings: Any,
) -> Report:  # fmt: skip
    """The first `frames` of a clip in each of `WAYS`, in turns: seconds, how many times faster than one after
    the other (the median over the rounds), and whether the file is the same, byte for byte.

    `extra["beside_model"]`: seconds of reading, writing and colour fix over those of the rest of the model.
    """
    weight = model.dit.patch_embedding.weight
    report = begin("overlap", weight.device, weight.dtype, clip=Path(clip).name, frames=frames)
    report.facts |= (facts or {}) | {"threads": torch.get_num_threads()}
    quiet = {"note": lambda sentence: None}
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder) / f"{i}.mp4" for i, name in enumerate(WAYS)}
        methods = {
            name: StreamingUpscaler(model, pipelined=beside, **settings, **quiet)
            for name, (_, beside) in WAYS.items()
        }

        def run(name: str) -> job.Done:
            return upscale_file(methods[name], clip, outs[name], frames, overlap=WAYS[name][0])

        first = next(iter(WAYS))
        with watched(methods[first]) as watch:  # the run that warms up
            times = run(first).times
        turns = measure.in_turns({name: lambda n=name: run(n) for name in WAYS}, repeats, warmup=0)
        files = {name: out.read_bytes() for name, out in outs.items()}
    colour = watch.parts["colour fix"]
    share = (times.read + times.write + colour) / (times.model - colour)
    report.facts["reading, writing, colour fix"] = f"{share:.1%} of the rest of the model"
    report.extra |= {"beside_model": share, "ways": []}
    for name, seconds in turns.items():
        gain = statistics.median(a / b for a, b in zip(turns[first], seconds, strict=True))
        same, each = files[name] == files[first], statistics.median(seconds)
        report.extra["ways"].append({"name": name, "seconds": seconds, "gain": gain, "same_file": same})
        note = f"{frames / each:.3g} FPS, {gain:.2f}x, {'the same file' if same else 'ANOTHER FILE'}"
        report.rows.append(Row(name, each, note=note))
    return report


def bench_memory(
    model: FlashVSR, clip: str, *, frames: int | None, page: Path | None = None,
    tell: Callable[[int], Any] | None = None, facts: dict[str, Any] | None = None, **settings: Any,
) -> Report:  # fmt: skip
    """Resident memory (on a GPU also torch's allocated) while a clip is upscaled as the command does it.

    `extra`: `first`, `all`: the most over the first 100 frames and over all, in bytes, by kind of memory;
    `more`: how much more that is, as a share; `samples`: frames given and bytes held after each push.
    page: written with the curve. tell: called with the frames that each push gave.
    """
    weight = model.dit.patch_embedding.weight
    device = weight.device
    settings = {"pipelined": worthwhile(device), "note": lambda sentence: None} | settings
    report = begin("memory", device, weight.dtype, clip=Path(clip).name, **(facts or {}))
    method = StreamingUpscaler(model, **settings)
    kinds = {"resident": (measure.resident_bytes, measure.peak_rss_bytes)}
    if device.type == "cuda":
        kinds["allocated"] = (
            lambda: torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats(device)
    samples: list[dict[str, int]] = []
    most: dict[str, int] = {}

    def sample(given: int) -> None:
        done = given + (samples[-1]["frames"] if samples else 0)
        samples.append({"frames": done} | {name: now() for name, (now, _) in kinds.items()})
        if done <= FIRST:
            most.update({name: peak() for name, (_, peak) in kinds.items()})
        if tell is not None:
            tell(given)

    measure.restart_peak()
    with tempfile.TemporaryDirectory() as folder:
        upscale_file(method, clip, Path(folder) / "out.mp4", frames, on_frames=sample)
    whole = {name: peak() for name, (_, peak) in kinds.items()}
    more = {name: whole[name] / most[name] - 1 for name in kinds}
    report.extra |= {"first": most, "all": whole, "more": more, "samples": samples}
    total = samples[-1]["frames"]
    for name in kinds:
        note = f"{most[name] / MIB:.1f} MiB over the first {FIRST} frames, {more[name]:+.2%} over all {total}"
        report.facts[name] = note
    if page is not None:
        _page(report, samples, list(kinds)).save(page)
    return report


def _page(report: Report, samples: list[dict[str, int]], kinds: list[str]) -> Page:
    page = Page("Memory while a clip is upscaled")
    page.protocol([f"{name}: {value}" for name, value in {**report.facts, **measure.machine()}.items()])
    at = [s["frames"] for s in samples]
    page.curves({name: (at, [s[name] / MIB for s in samples]) for name in kinds}, "MiB", "frames done")
    return page
