"""One campaign for one lent GPU: attention, the pipeline, and its switches one at a time, in minutes.

Every switch starts from the plain path: `gather` attention, nothing compiled, convolutions as torch does
them. It is timed, and its frames are compared with the plain path's: same weights, same input, same noise.
Parts that fail or find no time left are named in the result; the others go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flashvsr.attention.backends import available
from flashvsr.base import measure
from flashvsr.bench import attention
from flashvsr.bench.models import STEP_FRAMES, Subject
from flashvsr.bench.pipeline import bench_pipeline, running
from flashvsr.bench.report import Report
from flashvsr.models import lr_projector
from flashvsr.weights.folder import FlashVSR

NEUTRAL = 49.0  # dB: what rounding alone does in bfloat16
HELPS = 1.02
CLIP_LATENTS = {"tiny": 10, "small": 10, "wan1.3b": 22}
CLIP_SIZE = {"tiny": (128, 128), "small": (256, 256), "wan1.3b": (768, 1280)}

Apply = Callable[[FlashVSR], None]


@dataclass(frozen=True)
class Switch:
    """One change: of the model's modules, of how the projector convolves, of the attention backend."""

    name: str
    apply: Apply | None = None
    products: bool = False
    attention: str | None = None


@dataclass
class Campaign:
    """Everything measured: reports, the table of switches, and what failed or was left out."""

    reports: list[Report] = field(default_factory=list)
    switches: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        parts = [report.table() for report in self.reports]
        for report in self.reports:
            self.missing |= {f"{report.title}: {n}": t for n, t in report.extra.get("failed", {}).items()}
        if self.switches:
            parts.append(self._switch_table())
        if self.missing:
            parts.append("\n".join(f"not measured: {what} ({why})" for what, why in self.missing.items()))
        return "\n\n".join(parts)

    def _switch_table(self) -> str:
        lines = ["one change at a time, against the plain path", f"{'':34s} {'FPS':>8s} {'gain':>7s} "
                 f"{'max error':>10s} {'PSNR dB':>8s}"]  # fmt: skip
        for row in self.switches:
            psnr = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
            lines.append(
                f"{row['name']:34s} {row['fps']:8.2f} {row['gain']:6.2f}x {row['max_error']:10d} {psnr:>8s}"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "reports": [report.as_dict() for report in self.reports],
            "switches": self.switches,
            "missing": self.missing,
        }


def run(
    subject: Subject,
    sizes: Sequence[tuple[int, int]],
    *,
    minutes: float,
    repeats: int = 5,
    compiling: bool = True,
    say: Callable[[str], None] = print,
) -> Campaign:
    """The whole campaign; `subject` gives scale, device and dtype, `sizes` the output sizes in order of
    importance, the first also for the switches."""
    done, deadline = Campaign(), measure.Deadline(60 * minutes)
    subjects = [Subject(subject.scale, size, subject.device, subject.dtype) for size in sizes]
    block = subject.config.dit.block
    more = {"heads": subject.config.dit.heads, "head_dim": subject.config.dit.head_dim}
    where = (subject.device, subject.dtype)

    def steady(s: Subject) -> Report:
        shape = attention.steady(*s.size, block, s.area, **more)
        title = f"attention, steady chunk of {s.size[0]}x{s.size[1]}"
        return attention.bench(shape, *where, title=title, backward=False, repeats=repeats)

    def clip() -> Report:
        size, latents = CLIP_SIZE[subject.scale], CLIP_LATENTS[subject.scale]
        shape = attention.whole_clip(latents, *size, block, **more)
        title = f"attention, training clip of {latents} latents of {size[0]}x{size[1]}"
        return attention.bench(shape, *where, title=title, repeats=max(repeats // 2, 1))

    def pipeline(s: Subject) -> Report:
        title = f"pipeline at {s.size[0]}x{s.size[1]}, one step of 8 frames"
        return bench_pipeline(s, repeats=repeats, title=title)

    parts: list[tuple[str, Callable[[], Report]]] = []
    for s in subjects:
        parts.append((f"attention at {s.size[0]}x{s.size[1]}", lambda s=s: steady(s)))
        parts.append((f"pipeline at {s.size[0]}x{s.size[1]}", lambda s=s: pipeline(s)))
    # the first size, then the switches, then the rest: what matters most comes first
    for name, part in parts[:2]:
        _attempt(done, name, lambda part=part: done.reports.append(part()), deadline, say)
    _switches(done, subjects[0], deadline, repeats, compiling, say)
    _attempt(done, "attention of a training clip", lambda: done.reports.append(clip()), deadline, say)
    for name, part in parts[2:]:
        _attempt(done, name, lambda part=part: done.reports.append(part()), deadline, say)
    return done


def _attempt(
    done: Campaign,
    name: str,
    part: Callable[[], None],
    deadline: measure.Deadline,
    say: Callable[[str], None],
) -> None:
    if deadline.left <= 0:
        done.missing[name] = "no time left"
        return
    say(f"{name} ({deadline.left:.0f} s left)")
    try:
        part()
    except (RuntimeError, ValueError) as error:  # a kernel, memory, a size: the next part may still work
        done.missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        say(f"  failed: {done.missing[name]}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def switches(subject: Subject, compiling: bool) -> list[Switch]:
    """All changes there are here, one each."""
    dit = subject.config.dit
    tokens = dit.block[0] * dit.block[1] * dit.block[2]
    usable = available(subject.device, subject.dtype, dit.head_dim, tokens)
    others = [n for n, why in usable.items() if why is None and n not in ("gather", *attention.LEFT_OUT)]
    found = [Switch(f"attention {name}", attention=name) for name in others]
    found.append(Switch("projector as matrix products", products=True))
    found.append(Switch("decoder in channels-last order", apply=channels_last))
    if compiling:
        found.append(
            Switch("blocks compiled (before, after)", apply=lambda model: model.dit.compile_blocks())
        )
        found.append(Switch("decoder compiled", apply=compile_decoder))
    return found


def channels_last(model: FlashVSR) -> None:
    model.tc_decoder.to(memory_format=torch.channels_last)


def compile_decoder(model: FlashVSR) -> None:
    model.tc_decoder.forward = torch.compile(model.tc_decoder.forward, dynamic=False)


def _switches(
    done: Campaign, subject: Subject, deadline: measure.Deadline, repeats: int, compiling: bool,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    model = subject.model("dit", "lr_projector", "tc_decoder")
    plain: dict[str, Any] = {}

    def measured(name: str, used: Sequence[Switch]) -> None:
        frames, fps = _with(subject, model, used, repeats)
        if not plain:
            plain.update(frames=frames, fps=fps)
        difference = np.abs(frames.astype(np.int16) - plain["frames"])
        psnr = _psnr(difference)
        row = {"name": name, "fps": fps, "gain": fps / plain["fps"], "psnr": psnr}
        row["max_error"] = int(difference.max())
        done.switches.append(row | {"neutral": psnr is None or psnr >= NEUTRAL})

    _attempt(done, "plain path", lambda: measured("plain", []), deadline, say)
    if not plain:
        return
    found = {switch.name: switch for switch in switches(subject, compiling)}
    for name, switch in found.items():
        _attempt(done, name, lambda name=name, s=switch: measured(name, [s]), deadline, say)
    helped = [row for row in done.switches[1:] if row["gain"] >= HELPS and row["neutral"]]
    best: dict[bool, Switch] = {}
    together = []
    for row in sorted(helped, key=lambda row: -row["gain"]):
        switch = found[row["name"]]
        if switch.attention is None:
            together.append(switch)
        else:
            best.setdefault(True, switch)  # only one backend can be in use
    together += best.values()
    if len(together) > 1:
        _attempt(done, "together", lambda: measured("all that help, together", together), deadline, say)


def _psnr(difference: np.ndarray) -> float | None:
    """In dB, of 8-bit levels; None where nothing differs."""
    squared = float(np.square(difference.astype(np.float64)).mean())
    return float(10 * np.log10(255**2 / squared)) if squared else None


def _with(
    subject: Subject, model: FlashVSR, used: Sequence[Switch], repeats: int
) -> tuple[np.ndarray, float]:
    """Frames of a stream's second step under these switches, and steps' frames per second."""
    changed = copy.copy(model)
    changed.dit, changed.tc_decoder = copy.deepcopy(model.dit), copy.deepcopy(model.tc_decoder)
    for switch in used:
        if switch.apply is not None:
            switch.apply(changed)
    backend = next((s.attention for s in used if s.attention is not None), "gather")
    with ExitStack() as stack:
        stack.enter_context(_convolving(any(s.products for s in used)))
        upscaler, frames = running(changed, subject, attention=backend)
        out = upscaler.push(frames)
        seconds = measure.time_median(lambda: upscaler.push(frames), repeats)
    return out, STEP_FRAMES / seconds


@contextmanager
def _convolving(products: bool) -> Iterator[None]:
    """The projector's convolutions in one way on every device, for comparison."""
    kept = lr_projector.by_products, lr_projector.by_taps
    chosen = kept[0] if products else kept[1]
    lr_projector.by_products = lr_projector.by_taps = chosen
    try:
        yield
    finally:
        lr_projector.by_products, lr_projector.by_taps = kept
