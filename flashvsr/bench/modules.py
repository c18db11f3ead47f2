"""The modules one by one, as a running stream calls them: two latents, eight frames at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr import flops
from flashvsr.attention.backends import describe
from flashvsr.attention.plans import CachedStreaming
from flashvsr.base import measure
from flashvsr.bench.models import FIRST_FRAMES, STEP_FRAMES, Subject
from flashvsr.bench.report import Report, Row, begin
from flashvsr.models import lr_projector
from flashvsr.models.dit import DiT
from flashvsr.streaming.stream import FIRST_LATENTS, STEP_LATENTS

# Operations whose time is the work itself, by their names in torch's profiler: on a CPU, and as GPU kernels.
KINDS = {
    "attention": r"scaled_dot_product|flash|fmha|attention|_attend|tem_fused_flex",
    "convolution": r"conv|im2col|unfold|fprop|wgrad|dgrad",
    "matmul": r"aten::(mm|addmm|bmm|baddbmm|linear|mkldnn_linear)|gemm|cutlass|nvjet|cublas|xmma|splitK",
}


def rows_of(
    calls: dict[str, tuple[Callable[[], object], int | None]], device: torch.device, repeats: int
) -> list[Row]:
    """Measures functions, each with its useful work, in turns."""
    with torch.no_grad():
        times = measure.interleaved({name: call for name, (call, _) in calls.items()}, repeats)
        peaks = {name: measure.peak_bytes(call, device) for name, (call, _) in calls.items()}
    return [Row(name, times[name], work, peaks[name]) for name, (_, work) in calls.items()]


def step_of(
    subject: Subject, attention: str = "auto"
) -> tuple[Callable[[], list[Tensor]], DiT, CachedStreaming, flops.Work]:
    """A DiT in a running stream: one step as a function, the transformer, its plan, the useful work."""
    model = subject.model("dit", "lr_projector")
    stream = subject.stream(model, attention)
    dit = model.dit
    plan = stream.plan(STEP_LATENTS, *subject.size)
    latents = torch.randn(1, 16, STEP_LATENTS, subject.size[0] // 8, subject.size[1] // 8)
    latents = latents.to(subject.device, subject.dtype)
    features = [[torch.randn(1, STEP_LATENTS, *subject.grid, dit.config.dim).to(latents)]]
    sigma = torch.ones(1, 1, device=subject.device)

    def call() -> list[Tensor]:
        plan.selections.clear()  # as a new step's plan: it chooses its blocks
        return dit([latents], sigma, plan, features)

    with torch.no_grad():
        call()
    tokens = STEP_LATENTS * subject.grid[0] * subject.grid[1]
    pairs = sum(flops.selected_pairs(s) for s in plan.selections.values()) // len(plan.selections)
    return call, dit, plan, flops.dit(dit.config, tokens=tokens, pairs=pairs)


def bench_dit(
    subject: Subject, *, attention: str = "auto", repeats: int = 5, profile: bool = False
) -> Report:
    """One streaming step of the transformer, and its layers' three parts."""
    call, dit, plan, work = step_of(subject, attention)
    report = begin("DiT, one streaming step of 2 latents", subject.device, subject.dtype, **subject.facts())
    layers, dim = len(dit.blocks), dit.config.dim
    density = sum(s.density for s in plan.selections.values()) / layers
    facts = (subject.device, subject.dtype, dit.config.head_dim, plan.block_tokens)
    report.facts |= {"attention": describe(attention, *facts), "density": f"{density:.3f}"}
    tokens = STEP_LATENTS * subject.grid[0] * subject.grid[1]
    torch.manual_seed(0)
    x = torch.randn(1, tokens, dim).to(subject.device, subject.dtype)
    _, e6 = dit.embed_time(torch.ones(1, 1, device=subject.device))
    block = dit.blocks[0]
    with torch.no_grad():
        q, k, v = block.before(x, e6, plan.rope)
        out = plan.attend(0, q, k, v)

    def choose_and_attend() -> Tensor:
        plan.selections.pop(0)
        return plan.attend(0, q, k, v)

    p = {name: count // layers for name, count in work.parts.items()}
    after = p["projections"] // 4 + p["cross projections"] + p["cross attention"] + p["feed-forward"]
    report.rows += rows_of(
        {
            "step": (call, work.forward),
            "block: before (norms, q k v, rope)": (
                lambda: block.before(x, e6, plan.rope), p["projections"] // 4 * 3,
            ),
            "block: attend": (lambda: plan.attend(0, q, k, v), p["attention"]),
            "block: choose and attend": (choose_and_attend, p["attention"]),
            "block: after (prompt, feed-forward)": (lambda: block.after(x, out, e6), after),
        },
        subject.device, repeats,
    )  # fmt: skip
    step, before, attend, choosing, rest = (row.seconds for row in report.rows)
    selection = max(choosing - attend, 0.0)
    report.extra = {"layers": layers, "selection_of_attention": selection / attend, "density": density}
    blocks = layers * (before + choosing + rest)
    report.facts |= {
        "layers": layers,
        "selection": f"{selection / attend:.0%} of attention",
        "outside blocks": f"{max(1 - blocks / step, 0):.0%}",
    }
    if profile:
        with torch.no_grad():
            report.extra["shares"], report.extra["others"] = measure.shares(call, KINDS, subject.device)
    return report


def bench_projector(subject: Subject, *, repeats: int = 5) -> Report:
    """LR Proj-In on eight frames, and its convolutions in each way there is."""
    model = subject.model("lr_projector").lr_projector
    report = begin(
        "LR Proj-In, one streaming step of 8 frames", subject.device, subject.dtype, **subject.facts()
    )
    with torch.no_grad():
        _, memory = model(subject.frames(FIRST_FRAMES).to(subject.dtype))
    video = subject.frames(STEP_FRAMES).to(subject.dtype)
    sizes = {"frames": STEP_FRAMES, "height": subject.size[0], "width": subject.size[1], "start": False}
    work = flops.projector(model.config, **sizes)
    calls: dict[str, tuple[Callable[[], object], int | None]] = {
        "step": (lambda: model(video, memory), work.forward)
    }
    torch.manual_seed(0)
    for name, conv, frames in (("conv1", model.conv1, 10), ("conv2", model.conv2, 6)):
        x = torch.randn(1, frames, conv.in_channels, *(n + 2 for n in subject.grid))
        x = x.to(subject.device, subject.dtype)
        for way, convolve in (
            ("as products", lr_projector.by_products),
            ("as 2-D convolutions", lr_projector.by_taps),
            ("as conv3d", _conv3d),
        ):
            calls[f"{name} {way}"] = (
                lambda f=convolve, x=x, c=conv: f(x, c.weight, c.bias), work.parts[name],
            )  # fmt: skip
    report.rows += rows_of(calls, subject.device, repeats)
    return report


def _conv3d(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(padded.transpose(1, 2), weight, bias, stride=(2, 1, 1))


def bench_decoder(subject: Subject, *, repeats: int = 5) -> Report:
    """Both decoders on two latents; the TC decoder also with its weights in channels-last order."""
    model = subject.model("tc_decoder", "vae")
    report = begin(
        "decoders, one streaming step of 2 latents", subject.device, subject.dtype, **subject.facts()
    )
    height, width = subject.size
    torch.manual_seed(0)
    latents = torch.randn(1, 16, FIRST_LATENTS, height // 8, width // 8).to(subject.device, subject.dtype)
    video = subject.frames(4 * FIRST_LATENTS - 3)
    tc, vae = model.tc_decoder, model.vae
    two, frames = latents[:, :, :STEP_LATENTS], video[:, :, :STEP_FRAMES]
    with torch.no_grad():
        _, tc_memory = tc(latents, video)
        _, vae_memory = vae.decode(latents[:, :, :1])
    sizes = {"latents": STEP_LATENTS, "height": height, "width": width}
    tc_work = flops.tc_decoder(tc.config, **sizes).forward
    vae_work = flops.vae_decode(vae.config, start=False, **sizes).forward
    last = subject.model("tc_decoder").tc_decoder.to(memory_format=torch.channels_last)
    report.rows += rows_of(
        {
            "TC decoder": (lambda: tc(two, frames, tc_memory), tc_work),
            "TC decoder, channels last": (lambda: last(two, frames, tc_memory), tc_work),
            "VAE decoder": (lambda: vae.decode(two, vae_memory), vae_work),
        },
        subject.device, repeats,
    )  # fmt: skip
    return report
