"""Where the time of one upscale went: latency, throughput, parts, waits, memory of a run of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flashvsr.base import measure
from flashvsr.streaming import clip, stream, tiling
from flashvsr.streaming.frames import Canvas
from flashvsr.streaming.pipeline import Times

MIB = 2**20


@dataclass
class Watch:
    """What a watched run showed beside its `Times`: seconds of the model's parts, memory in bytes."""

    parts: dict[str, float] = field(default_factory=dict)
    allocated: int | None = None  # most of torch's allocator on a GPU
    reserved: int | None = None
    rss: int = 0  # most of the process


@contextmanager
def watched(method: Any) -> Iterator[Watch]:
    """Times the parts of a StreamingUpscaler or ClipUpscaler meanwhile; on a GPU each part is waited for,
    which costs a little."""
    watch, device = Watch(), method.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with measure.watch(_parts(method)) as spent:
        yield watch
    # a tile's parts and a whole picture's are one part
    for name, seconds in spent.items():
        part = name.removesuffix(" of tiles")
        watch.parts[part] = watch.parts.get(part, 0.0) + seconds
    if device.type == "cuda":
        watch.allocated = torch.cuda.max_memory_allocated(device)
        watch.reserved = torch.cuda.max_memory_reserved(device)
    watch.rss = measure.peak_rss_bytes()


def _parts(method: Any) -> dict[str, tuple[Any, str]]:
    model = method.model
    parts = {
        "upsampling": (Canvas, "place_8bit"),
        "LR projector": (model.lr_projector, "forward"),
        "DiT": (model.dit, "forward"),
        "decoder": (method.decoder, "forward" if method.decoder_name == "tc" else "decode"),
        "colour fix": (clip if type(method) is clip.ClipUpscaler else stream, "correct"),
        "colour fix of tiles": (tiling, "correct"),
        "to uint8 on the host": (Canvas, "take"),
    }
    return parts


def latency(times: Times, watch: Watch, queue_depth: int = 2) -> dict[str, Any]:
    """The report of one run, in seconds and bytes, for JSON.

    first_output_seconds: from the start, reading included; latency_p50, latency_p95: of the model's call that
    gave a frame, over all frames but those of the first such call where others came later, as
    `eval.benchmark` counts it; fps: all frames over the whole run, loading excluded.
    """
    giving = [(seconds, frames) for seconds, frames in times.pushes if frames]
    each = [seconds for seconds, frames in giving[1:] or giving for _ in range(frames)]
    return {
        "machine": measure.machine(),
        "frames": times.frames,
        "seconds": times.total,
        "fps": times.frames / times.total,
        "first_output_seconds": times.first,
        "latency_p50": float(np.percentile(each, 50)),
        "latency_p95": float(np.percentile(each, 95)),
        "busy_seconds": {"read": times.read, "model": times.model, "write": times.write},
        "model_waited_seconds": {"for frames": times.read_wait, "for the writer": times.write_wait},
        "queue_depth": queue_depth,
        "part_seconds": watch.parts | {"rest": times.model - sum(watch.parts.values())},
        "peak_bytes": {"allocated": watch.allocated, "reserved": watch.reserved, "rss": watch.rss},
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    model, frames = report["busy_seconds"]["model"], report["frames"]
    rows = [
        ("first output", f"{report['first_output_seconds']:.3f} s", "from the start, reading included"),
        ("latency p50", f"{1e3 * report['latency_p50']:.1f} ms", "of the call that gave a frame"),
        ("latency p95", f"{1e3 * report['latency_p95']:.1f} ms", ""),
        ("throughput", f"{report['fps']:.3g} frames/s", f"{frames} frames in {report['seconds']:.2f} s"),
    ]
    rows += [
        (name, _each(s, frames), f"{s / model:.1%} of the model")
        for name, s in report["busy_seconds"].items()
    ]
    rows += [
        (f"  {name}", _each(s, frames), f"{s / model:.1%}") for name, s in report["part_seconds"].items()
    ]
    rows += [(f"model waited {name}", f"{s:.3f} s", "") for name, s in report["model_waited_seconds"].items()]
    for name, held in report["peak_bytes"].items():
        if held is not None:
            rows.append((f"peak {name}", f"{held / MIB:.0f} MiB", ""))
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c}".rstrip() for a, b, c in rows)


def _each(seconds: float, frames: int) -> str:
    return f"{1e3 * seconds / frames:.2f} ms/frame"
