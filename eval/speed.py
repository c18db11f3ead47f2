"""What a method costs on one clip pushed frame by frame: latency, throughput, operations, parameters, memory.

A method is anything with `push(frames)` and `flush()`. The latency of an output frame is the time from the
moment the last input frame it needs is there until it is in the host's memory: the seconds of the push (or
flush) that gave it. That it had to wait for later frames is no time of ours but of the camera's, and is told
apart as its delay in frames.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.methods import Method, Upscaler, open_method
from flashvsr import flops
from flashvsr.attention import backends
from flashvsr.base import measure
from flashvsr.base.cli import UserError

Start = Callable[[], Upscaler]


@dataclass(frozen=True)
class Clip:
    """What is pushed: `frames` LR frames of height x width, `push` at a time, to become `scale` times as
    large."""

    height: int
    width: int
    frames: int
    push: int = 1
    scale: int = 4

    def pixels(self) -> np.ndarray:
        """uint8 `F H W 3`, noise: how long a method takes hardly depends on what it sees."""
        shape = (self.frames, self.height, self.width, 3)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@dataclass(frozen=True)
class Call:
    """One push or flush: LR frames in by then, SR frames it gave, its seconds; `flush` tells which."""

    taken: int
    given: int
    seconds: float
    flush: bool


def run_clip(upscaler: Upscaler, pixels: np.ndarray, push: int) -> list[Call]:
    """Pushes a clip and flushes, every output brought to the host. UserError where frames are lost."""
    calls, taken = [], 0
    for piece in [*(pixels[i : i + push] for i in range(0, len(pixels), push)), None]:

        def call(piece: np.ndarray | None = piece) -> torch.Tensor:
            return torch.as_tensor(upscaler.flush() if piece is None else upscaler.push(piece)).cpu()

        out, seconds = measure.timed(call)
        taken += 0 if piece is None else len(piece)
        calls.append(Call(taken, len(out), seconds, piece is None))
    if (given := sum(call.given for call in calls)) != len(pixels):
        raise UserError(f"{len(pixels)} frames went in, {given} came out; they must be as many")
    return calls


def time_methods(
    starts: Mapping[str, Start],
    clip: Clip,
    repeats: int,
    warmup: int,
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, list[list[Call]]]:
    """Every method on the clip, in turns: `repeats` measured runs of each, after `warmup` others. Making the
    upscaler is not timed, nor is loading. `tell` hears the name of every run that has ended."""
    pixels = clip.pixels()
    runs: dict[str, list[list[Call]]] = {name: [] for name in starts}

    def one(name: str) -> None:
        try:
            runs[name].append(run_clip(starts[name](), pixels, clip.push))
        except UserError as error:
            raise UserError(f"method {name!r}: {error}") from error
        except torch.OutOfMemoryError as error:
            size = f"{clip.height}x{clip.width}"
            raise UserError(
                f"method {name!r} runs out of memory at --size {size}; take a smaller one"
            ) from error
        tell(name)

    measure.in_turns({name: lambda name=name: one(name) for name in starts}, repeats, warmup)
    return {name: own[warmup:] for name, own in runs.items()}


def summary(runs: Sequence[Sequence[Call]]) -> dict[str, Any]:
    """The numbers of one method's runs over the same clip; seconds unless they are named otherwise.

    first_output: of the call that gave the first frame, median of runs; first_output_frames: input frames
    that had to be there; latency_p50, latency_p95: over the output frames of all runs, those of the first
    call left out where others came later; delay_frames: the most input frames that came after a frame before
    it was put out; waits_for_all: nothing came out before the clip's end; seconds_per_frame and fps: of all
    calls together, median of runs; steady_fps: of the pushes after the first output (None: there were none);
    per_frame: the latency of each output frame, median of runs.
    """
    calls = runs[0]
    first = next(i for i, call in enumerate(calls) if call.given)
    frames = sum(call.given for call in calls)
    owner = [i for i, call in enumerate(calls) for _ in range(call.given)]
    later = [i for i in owner if i > first] or owner
    latencies = [run[i].seconds for run in runs for i in later]
    total = statistics.median(sum(call.seconds for call in run) for run in runs)
    steady = [i for i, call in enumerate(calls) if i > first and not call.flush]
    made = sum(calls[i].given for i in steady)
    of_steady = statistics.median(sum(run[i].seconds for i in steady) for run in runs) if made else None
    return {
        "first_output_seconds": statistics.median(run[first].seconds for run in runs),
        "first_output_frames": calls[first].taken,
        "latency_p50": float(np.percentile(latencies, 50)),
        "latency_p95": float(np.percentile(latencies, 95)),
        "delay_frames": max(calls[i].taken - 1 - j for j, i in enumerate(owner)),
        "waits_for_all": calls[first].flush,
        "seconds_per_frame": total / frames,
        "fps": frames / total,
        "steady_fps": made / of_steady if of_steady else None,
        "per_frame": [statistics.median(run[i].seconds for run in runs) for i in owner],
    }


def count_work(fn: Callable[[], Any]) -> tuple[int, int]:
    """Useful operations of one call of `fn`, and parameters of the modules it runs.

    Operations as torch's counter has them (flashvsr.flops says what counts); block-sparse attention, whose
    kernels it cannot see or sees with their padding, as the pairs that were selected.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not in torch's list
    counter = FlopCounterMode(
        display=False, custom_mapping={fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    )
    parameters: dict[int, int] = {}
    attend, difference = backends.sparse_attention, 0

    def sparse_attention(q, k, v, selection, **more):
        nonlocal difference
        before = counter.get_total_flops()
        out = attend(q, k, v, selection, **more)
        batch, heads, _, head_dim = q.shape
        useful = batch * flops.attention(flops.selected_pairs(selection), heads * head_dim)
        difference += useful - (counter.get_total_flops() - before)
        return out

    def note(module: torch.nn.Module, *_: Any) -> None:
        parameters.update((id(p), p.numel()) for p in module.parameters())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    backends.sparse_attention = sparse_attention
    try:
        with counter:
            fn()
    finally:
        backends.sparse_attention = attend
        hook.remove()
    return counter.get_total_flops() + difference, sum(parameters.values())


def memory_of(method: Method, clip: Clip, device: str, dtype: torch.dtype) -> dict[str, int | None]:
    """Memory of loading a method and running the clip, in a process of its own: no other's peak counts.

    peak_bytes: the most held beyond what an idle process with the same imports holds: allocated on a GPU,
    resident on a CPU (to a few MiB; None where the system cannot tell); reserved_bytes: by torch's
    allocator on a GPU, else None; rss_bytes: the most resident memory of the whole process.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_memory, method, clip, device, dtype).result()
    except BrokenProcessPool as error:
        raise UserError(
            f"method {method.name!r}: the process that measures memory was killed, most likely for want of "
            f"it; take a smaller --size"
        ) from error


def _memory(method: Method, clip: Clip, device: str, dtype: torch.dtype) -> dict[str, int | None]:
    import flashvsr.streaming.method
    import flashvsr.weights.load  # noqa: F401  what a model imports is no memory of the model

    pixels = clip.pixels()
    # A first small product makes the libraries' own memory, which every method shares.
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)

    def whole() -> None:
        run_clip(open_method(method, clip.scale, device, dtype)(), pixels, clip.push)

    peak = measure.peak_bytes(whole, torch.device(device))
    gpu = torch.device(device).type == "cuda"
    return {
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if gpu else None,
        "rss_bytes": measure.peak_rss_bytes(),
    }
