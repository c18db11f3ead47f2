"""The only timer: warm-up, interleaved repeats, medians, parts, shares, peak memory, and on which machine."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from flashvsr.base.heap import give_back

T = TypeVar("T")


def timed(fn: Callable[[], T]) -> tuple[T, float]:
    """What `fn` returns, and its wall-clock seconds; GPU work is waited for before and after."""
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = fn()
    if gpu:
        torch.cuda.synchronize()
    return result, time.perf_counter() - begun


def _seconds(fn: Callable[[], Any]) -> float:
    return timed(fn)[1]


def interleaved(fns: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function, measured in turns so that a drift of the machine meets all alike.

    Every function first runs `warmup` times unmeasured; each round then begins with another function. GPU
    work is waited for. ValueError when `repeats` is less than 1.
    """
    rounds = in_turns(fns, repeats, warmup)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def in_turns(
    fns: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """The seconds of every single measured run of `interleaved`, in order."""
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
    return times


class Deadline:
    """Time that is left of a number of seconds."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()


def time_median(fn: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
    """Median seconds of one function."""
    return interleaved({"": fn}, repeats, warmup)[""]


def split(
    fn: Callable[[], Any], parts: Mapping[str, tuple[Any, str]], repeats: int = 5, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of one call of `fn` ("all") and of what it spends in its parts, and in none ("rest").

    parts: name -> (object, attribute): a function of a module or class, or a method of an object (a module's
    `forward`), replaced by a timed one meanwhile. Parts must not call each other. GPU work is waited for at
    the ends of each part, which costs a little: time `fn` alone for its speed.
    """
    rounds: dict[str, list[float]] = defaultdict(list)
    with watch(parts) as spent:
        for turn in range(warmup + repeats):
            spent.update(dict.fromkeys(parts, 0.0))
            total = _seconds(fn)
            if turn >= warmup:
                for name, seconds in {**spent, "rest": total - sum(spent.values()), "all": total}.items():
                    rounds[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


@contextmanager
def watch(parts: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Gives the seconds spent so far in each of the parts that `split` describes, while the block runs."""
    spent = dict.fromkeys(parts, 0.0)
    owned = {name: attribute in vars(owner) for name, (owner, attribute) in parts.items()}
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}

    def timed(name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = None

            def call() -> None:
                nonlocal result
                result = originals[name](*args, **kwargs)

            spent[name] += _seconds(call)
            return result

        return wrapper

    try:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, timed(name))
        yield spent
    finally:
        for name, (owner, attribute) in parts.items():
            if owned[name]:
                setattr(owner, attribute, originals[name])
            else:
                delattr(owner, attribute)


def shares(
    fn: Callable[[], Any], kinds: Mapping[str, str], device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """What share of one call's time is spent in operations of which kind, by torch's profiler.

    kinds: name -> regular expression found in an operation's name (a kernel's on a GPU); the first that fits
    counts. Returns the shares by kind, with "other", and the largest single operations of "other".
    """
    from torch.profiler import ProfilerActivity, profile

    fn()
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        _seconds(fn)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == gpu:
            times[event.key] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(times.values())
    by_kind = dict.fromkeys([*kinds, "other"], 0.0)
    others: dict[str, float] = {}
    for name, time_spent in sorted(times.items(), key=lambda item: -item[1]):
        kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), "other")
        by_kind[kind] += time_spent / total
        if kind == "other":
            others[name] = time_spent / total
    return by_kind, dict(list(others.items())[:8])


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of a large square matrix product of random numbers: the machine's ceiling."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / time_median(lambda: torch.mm(a, b, out=out), repeats, warmup=2)


def peak_bytes(fn: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory one call of `fn` holds beyond what was held before, its results included.

    On a GPU as allocated; on a CPU as resident, to a few MiB; None where the system cannot tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not restart_peak():
        return None
    before = resident_bytes()
    fn()
    return max(_status_bytes("VmHWM") - before, 0)


def restart_peak() -> bool:
    """Lets `peak_rss_bytes` count from what is resident now; False where the system cannot do that."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return False
    give_back()  # reused memory would be no growth
    try:
        reset.write_text("5")  # Linux: the peak of resident memory starts anew
    except OSError:
        return False
    return True


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system cannot tell."""
    return _status_bytes("VmRSS") if Path("/proc/self/status").exists() else 0


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_rss_bytes() -> int:
    """The most resident memory this process has held, in bytes."""
    if Path("/proc/self/status").exists() and (peak := _status_bytes("VmHWM")):
        # Not getrusage: there a process starts with the peak of the one that forked it.
        return peak
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
