"""`python -m train.estimate stage=vae|1|2|3|decoder scale=NAME gpu=h100-80g gpus=32 [key=value ...]`.

What one stage of a run costs, before anything is run: parameters, memory by item, work, time. Takes the keys
of `python -m train`; exit code 2 when it does not fit. The modules are those that train, on fake tensors.

  gpu=NAME           of the card (default h100-80g)
  gpus=N             how many (default 1)
  efficiency=0.35    executed operations over the card's dense peak: measured by nobody for you, so say it
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashvsr.base import cli
from flashvsr.base.cli import UserError
from train.config import TrainConfig, compose, rewrite
from train.costs import Costs, estimate

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Usable memory in GiB and dense peaks in TFLOP/s, from NVIDIA's data sheets (bf16 with float32 sums)."""

    memory: float
    bf16: float
    fp32: float


GPUS = {
    "a100-40g": Gpu(39.4, 312, 19.5),
    "a100-80g": Gpu(79.2, 312, 19.5),
    "h100-80g": Gpu(79.2, 989, 67),
    "h200-141g": Gpu(139.8, 989, 67),
    "b200-180g": Gpu(178.0, 2250, 80),
    "rtx3090-24g": Gpu(23.6, 71, 35.6),
    "rtx4090-24g": Gpu(23.5, 165, 82.6),
    "l40s-48g": Gpu(44.4, 362, 91.6),
}
RESERVE = 0.06  # of the memory, for the context, the allocator's gaps and the libraries' own buffers


def limit(gpu: Gpu) -> float:
    """Bytes that tensors may take."""
    return gpu.memory * (1 - RESERVE) * GIB


def smaller(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Changes that save memory, the smallest first: those that leave the result alone, then shorter clips."""
    stages: list[list[tuple[str, dict[str, Any]]]] = [[("", {})] for _ in range(3)]
    keeps = {"none": ["selective", "full"], "selective": ["full"], "full": []}[config.checkpointing]
    stages[0] += [(f"checkpointing={kind}", {"checkpointing": kind}) for kind in keeps]
    if not config.offload and config.stage.name not in ("vae", "decoder"):
        last = [config.checkpointing] if config.recomputes else []
        for kind in [*last, *keeps]:
            words = "offload=true" if kind == config.checkpointing else f"checkpointing={kind} offload=true"
            stages[0].append((words, {"checkpointing": kind, "offload": True}))
    if config.parallel.kind != "fsdp2":
        stages[1].append(("parallel=fsdp2", {"parallel": replace(config.parallel, kind="fsdp2")}))
    if config.micro_batch_size > 1:
        stages[2].append(("micro_batch_size=1", {"micro_batch_size": 1}))
    found = []
    for chosen in itertools.product(*stages):
        words = [name for name, _ in chosen if name]
        changes = {k: v for _, change in chosen for k, v in change.items()}
        found.append((len(words), " ".join(words), replace(config, **changes)))
    found = [(words, changed) for count, words, changed in sorted(found, key=lambda f: f[0]) if count]
    most, shorter_clips = found[-1:] or [("", config)], []
    for latents in (22, 14, 10, 8, 6):
        if latents < config.data.latents_per_clip and config.stage.name != "vae":
            for words, changed in ([("", config)] if found else []) + most:
                shorter = replace(changed, data=replace(changed.data, latents_per_clip=latents))
                shorter_clips.append((f"{words} data.latents_per_clip={latents}".strip(), shorter))
    return found + shorter_clips


def suggestion(config: TrainConfig, gpus: int, gpu: Gpu) -> str:
    for words, changed in smaller(config):
        if estimate(changed, gpus).peak <= limit(gpu):
            return f"the smallest change that fits is {words}"
    return "no change of checkpointing, offload, parallel, micro_batch_size or clip length makes it fit: " \
        "lower data.height and data.width, or take a larger card"  # fmt: skip


def report(config: TrainConfig, costs: Costs, name: str, gpus: int, efficiency: float) -> list[str]:
    """The lines the command prints."""
    gpu = GPUS[name]
    d = config.data
    lines = [
        f"{config.stage.name} at scale {config.scale.preset} on {gpus} x {name}, "
        f"parallel={config.parallel.kind}, {config.precision}, "
        f"checkpointing={config.checkpointing}{', offloaded' if config.offload else ''}, "
        f"clips of {d.latents_per_clip} latents {d.height}x{d.width}, micro batch {config.micro_batch_size}",
        "",
        f"{'model':16s}{'parameters':>14s}{'trained':>14s}   memory per GPU, GiB",
    ]
    for model, (count, trained, _) in costs.parameters.items():
        items = ", ".join(f"{item} {size / GIB:.3f}" for item, size in costs.state[model].items())
        lines.append(f"{model:16s}{count:14,d}{trained:14,d}   {items}")
    lines += ["", f"{'inputs of a step':54s}{costs.inputs / GIB:9.3f} GiB"]
    for turn, items in costs.turns.items():
        for item, size in items.items():
            lines.append(f"{f'turn of {turn}: {item}':54s}{size / GIB:9.3f} GiB")
    if config.offload:
        lines.append(f"{'kept for backward in host memory':54s}{costs.offloaded / GIB:9.3f} GiB")
    for item, size in costs.frozen.items():
        lines.append(f"{f'without gradient, peak: {item}':54s}{size / GIB:9.3f} GiB (approximation)")
    lines.append(f"{'save: largest tensor, whole on every GPU':54s}{costs.save_device / GIB:9.3f} GiB")
    lines.append(f"{'save: whole state, host memory of the main rank':54s}{costs.save_host / GIB:9.3f} GiB")
    peak = "fp32" if config.precision == "fp32" else "bf16"
    rate = (gpu.fp32 if peak == "fp32" else gpu.bf16) * 1e12
    seconds = costs.executed * config.global_batch_size / gpus / rate / efficiency
    lines += [
        f"{'peak per GPU':54s}{costs.peak / GIB:9.3f} GiB of {limit(gpu) / GIB:.1f} usable "
        f"({gpu.memory:g} less {RESERVE:.0%}; buffers inside backward operations are not counted)",
        "",
        f"tokens: {costs.tokens:,} a sample, {costs.tokens * config.global_batch_size:,} a step",
        f"operations: {costs.useful / 1e12:,.3f} TFLOP useful, {costs.executed / 1e12:,.3f} executed "
        f"a sample; x {config.global_batch_size} a step",
        f"step: {seconds:.2f} s at efficiency {efficiency:g} (executed over {rate / 1e12:g} TFLOP/s of {peak}"
        f"; an assumption); {config.steps:,} steps: {seconds * config.steps / 86400:.2f} days",
    ]
    return lines


def _taken(argv: Sequence[str], key: str, default: str) -> tuple[str, list[str]]:
    given = [a.partition("=")[2] for a in argv if a.startswith(f"{key}=")]
    return (given[-1] if given else default), [a for a in argv if not a.startswith(f"{key}=")]


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\ncards: {', '.join(GPUS)}")
        return 0
    name, argv = _taken(argv, "gpu", "h100-80g")
    number, argv = _taken(argv, "gpus", "1")
    share, argv = _taken(argv, "efficiency", "0.35")
    if name not in GPUS:
        raise UserError(f"gpu={name} is not in the table; there are {', '.join(GPUS)}")
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"gpus={number} is no number of GPUs: give 1 or more")
    try:
        efficiency = float(share)
    except ValueError:
        efficiency = 0.0
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency={share} is no share of the peak: give a number above 0, up to 1")
    stages, overrides = rewrite(argv)
    for stage in stages:
        config = compose(stage, overrides)
        costs = estimate(config, int(number))
        print("\n".join(report(config, costs, name, int(number), efficiency)), flush=True)
        if costs.peak > limit(GPUS[name]):
            raise UserError(
                f"stage={stage} needs {costs.peak / GIB:.1f} GiB per GPU, {name} has "
                f"{limit(GPUS[name]) / GIB:.1f} usable: {suggestion(config, int(number), GPUS[name])}"
            )
        print("fits\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
