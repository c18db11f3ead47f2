"""The only timer: warm-up, interleaved repeats, medians, peak memory, and on which machine."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def _seconds(fn: Callable[[], Any]) -> float:
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    fn()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def interleaved(fns: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function, measured in turns so that a drift of the machine meets all alike.

    Every function first runs `warmup` times unmeasured; each round then begins with another function. GPU
    work is waited for. ValueError when `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    names = list(fns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(_seconds(fns[name]))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def time_median(fn: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Median seconds of one function."""
    return interleaved({"": fn}, repeats, warmup)[""]


def peak_rss_bytes() -> int:
    """The most resident memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there a process starts with the peak of the one that forked it.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What a measurement was made on: cpu, cores (those this process may use), gpu, torch, python, date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
