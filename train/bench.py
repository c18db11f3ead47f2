"""`python -m train.bench [stage=1|2|3|1..3] [scale=NAME] [key=value ...]`: training steps on one device, with
random weights and random clips, beside what `train.estimate` says of them.

Sizes go from 25 frames of 384x640 up to 89 of 768x1280 (`scale=wan1.3b`) until one does not fit. At the
smallest, and at the largest that fits, every way of keeping activations, offloaded and compiled, is measured
too. Takes the keys of `python -m train`.

  --minutes=9      start nothing new after this
  --sizes=FxHxW,…  LR frames and output size, instead of the scale's
  --repeats=3      the median of so many steps
  --json=FILE      all numbers

Needs torch, numpy, safetensors, pyyaml and tqdm alone. Without the packages lpips and torchvision, stage 3 is
measured without LPIPS, and says so.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvsr.base import cli, measure
from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic
from flashvsr.config import PRESETS
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import random_prompt
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import FlashVSR, ModelInfo
from train.compose import compose_yaml
from train.config import TrainConfig, rewrite
from train.costs import Costs, estimate
from train.launch import World
from train.loop import train_step
from train.parallel.activations import recompute
from train.parallel.apply import compile_blocks
from train.stages import stage_class
from train.stages.shared import Stage

GIB = 2**30
# 4n+1 LR frames, height, width
SIZES = {
    "tiny": ((17, 64, 64), (25, 128, 128)),
    "small": ((25, 128, 128), (41, 256, 256)),
    "wan1.3b": (
        (25, 384, 640), (41, 384, 640), (89, 384, 640), (41, 768, 1280), (57, 768, 1280), (89, 768, 1280),
    ),
}  # fmt: skip

WAYS = [("none", False), ("selective", False), ("full", False), ("selective", True), ("full", True)]


def has_lpips() -> bool:
    """Whether stage 3's perceptual loss can be measured here."""
    return find_spec("lpips") is not None and find_spec("torchvision") is not None


class RandomModels:
    """Mixed into a stage: models and prompt drawn, not read from folders; no LPIPS where it is not there."""

    config: TrainConfig
    device: torch.device

    def lpips_loss(self, sr: Tensor, *others: Any) -> Tensor:
        return super().lpips_loss(sr, *others) if has_lpips() else 0 * sr.flatten(1).mean(1)

    def find(self, part: str, kinds: Sequence[str] | None = None) -> FlashVSR:
        sizes = PRESETS[self.config.scale.preset]
        info = ModelInfo(
            kind=(kinds or ["teacher"])[0], projector_mode="causal", area=1, sparse_ratio=None, steps=1,
            window=None, provenance={},
        )  # fmt: skip
        with torch.device(self.device):  # drawing a billion weights takes a minute on a CPU
            if part == "vae":
                return FlashVSR(vae=WanVAE(sizes.vae), config=sizes, info=info, source="random")
            dit, projector = DiT(sizes.dit), LRProjector(sizes.lr_projector)
        prompt = random_prompt(sizes.dit, self.config.seed)
        return FlashVSR(
            dit=dit, lr_projector=projector, prompt=prompt, config=sizes, info=info, source="random"
        )

    of_run = find


def random_stage(config: TrainConfig, device: torch.device) -> Stage:
    """The configured stage on one process, with random weights."""
    own = stage_class(config.stage.name)
    return type(own.__name__, (RandomModels, own), {})(config, World(0, 1, 0, device))


def random_micro(config: TrainConfig, step: int = 0) -> dict[str, Any]:
    """A micro-batch as the loader gives it, without latents: encoded anew, as in a run without a cache."""
    d, size = config.data, config.micro_batch_size
    made = torch.Generator().manual_seed(step)

    def segment(frames: int) -> dict[str, Tensor]:
        shapes = {"hr": (d.height, d.width), "lr": (d.height // 4, d.width // 4)}
        return {
            name: torch.randint(0, 256, (size, 3, frames, *shape), dtype=torch.uint8, generator=made)
            for name, shape in shapes.items()
        }

    images = d.images if config.stage.name == "teacher" else 0
    return {
        "ids": [str(i) for i in range(size)],
        "counters": torch.arange(size) + step * size,
        "segments": [segment(4 * d.latents_per_clip + 1), *(segment(1) for _ in range(images))],
    }


def rearm(stage: Stage, config: TrainConfig) -> None:
    """The same weights under another size, another way of keeping activations, compiled or not."""
    stage.config = stage.feed.config = config
    denoisers = [engine.module for engine in stage.roles.values()]
    denoisers += [stage.teacher] if config.stage.name == "one_step" and stage.teacher is not None else []
    for denoiser in denoisers:
        for block in denoiser.dit.blocks:
            for part in ("before", "after"):
                vars(block).pop(part, None)
        compile_blocks(denoiser, config)
    for engine in stage.roles.values():
        engine.optimizer.zero_grad(set_to_none=True)
        recompute(engine.module.dit, config.checkpointing, offload=config.offload)
    stage.frozen_vae.checkpointing = config.recomputes


@dataclass(frozen=True)
class Row:
    """One measured step: bytes, seconds, operations; `peak` and `seconds` None where `note` says why."""

    stage: str
    size: str
    way: str
    estimated: int
    useful: float
    executed: float
    seconds: float | None = None
    peak: int | None = None
    note: str = ""


def ways(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Every way of keeping activations, then compiled."""
    found = []
    for kind, offload in WAYS:
        name = f"{kind}{' offloaded' if offload else ''}"
        found.append((name, replace(config, checkpointing=kind, offload=offload)))
    for kind in ("selective", "full"):
        found.append((f"{kind} compiled", replace(config, checkpointing=kind, compile=True)))
    return found


def turns(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Stage 3 has two kinds of step: of both roles, and of the fake score alone."""
    s = config.stage
    if s.name != "one_step" or not s.loss.dmd:
        return [(s.name, config)]
    kinds = {"one_step": 1, "one_step, fake score only": 10**9}
    return [(name, replace(config, stage=replace(s, student_every=every))) for name, every in kinds.items()]


class Campaign:
    """Rows so far, and the time there is."""

    def __init__(self, device: torch.device, minutes: float, repeats: int):
        self.device, self.repeats, self.deadline = device, repeats, measure.Deadline(60 * minutes)
        self.rows: list[Row] = []
        self.said: dict[str, Costs] = {}
        self.memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
        self.rate = math.nan

    def costs(self, config: TrainConfig) -> Costs:
        plain = replace(config, compile=False)
        key = repr(plain)
        if key not in self.said:
            self.said[key] = estimate(plain, 1)
        return self.said[key]

    def step(self, stage: Stage, name: str, way: str, config: TrainConfig) -> bool:
        """Measures one row; whether it ran."""
        costs, d = self.costs(config), config.data
        size = f"{4 * d.latents_per_clip + 1}x{d.height}x{d.width}"
        row = Row(name, size, way, costs.peak, costs.useful, costs.executed)
        rearm(stage, config)
        micro = random_micro(config)
        if self.deadline.left <= 0:
            row = replace(row, note="no time left")
        elif costs.peak > 1.3 * self.memory:
            row = replace(row, note="not tried: it cannot fit")
        else:
            row = self._measured(row, stage, micro, costs)
        self.rows.append(row)
        print(self.cells(row), flush=True)
        self._free(stage)
        return row.seconds is not None

    def _measured(self, row: Row, stage: Stage, micro: Mapping[str, Any], costs: Costs) -> Row:
        def run() -> None:
            train_step(stage, [micro], 0)

        try:
            run()  # compiles, and makes the optimiser's state
            before = costs.held
            if self.device.type == "cuda":
                before = torch.cuda.memory_allocated(self.device)
            grown = measure.peak_bytes(run, self.device)
            seconds = measure.time_median(run, self.repeats, warmup=0)
        except torch.OutOfMemoryError:
            return replace(row, note="out of memory")
        return replace(row, seconds=seconds, peak=None if grown is None else before + grown)

    def _free(self, stage: Stage) -> None:
        for engine in stage.roles.values():
            engine.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def cells(self, row: Row) -> str:
        text = f"{row.stage:26s}{row.size:14s}{row.way:21s}"
        if row.seconds is None:
            return f"{text}{row.note}; estimated {row.estimated / GIB:.1f} GiB"
        mfu, hfu = (count / row.seconds / self.rate for count in (row.useful, row.executed))
        peak = "      -" if row.peak is None else f"{row.peak / GIB:7.2f}"
        share = f"{row.useful / 1e12:10.2f}{mfu:7.1%}{hfu:7.1%}"
        return f"{text}{row.seconds:8.3f}{share}{peak}{row.estimated / GIB:10.2f}"

    def head(self) -> str:
        columns = f"{'s/step':>8s}{'TFLOP':>10s}{'MFU':>7s}{'HFU':>7s}{'GiB':>7s}{'estimate':>10s}"
        return f"{'stage':26s}{'size':14s}{'activations':21s}{columns}"


def run_stage(campaign: Campaign, config: TrainConfig, sizes: Sequence[tuple[int, int, int]]) -> None:
    """All ways at the smallest size, larger ones as long as they fit, all ways at the largest that did."""

    def at(frames: int, height: int, width: int) -> TrainConfig:
        data = replace(config.data, latents_per_clip=(frames - 1) // 4, height=height, width=width)
        return replace(config, data=data)

    stage = random_stage(at(*sizes[0]), campaign.device)

    def every(size: tuple[int, int, int], skip: Sequence[str] = ()) -> None:
        for way, chosen in ways(at(*size)):
            for name, changed in turns(chosen) if way not in skip else []:
                campaign.step(stage, name, way, changed)

    every(sizes[0])
    largest = None
    for size in sizes[1:]:
        fits = [
            campaign.step(stage, name, "full", changed)
            for name, changed in turns(replace(at(*size), checkpointing="full"))
        ]
        if not all(fits):
            break
        largest = size
    if largest is not None:
        every(largest, skip=["full"])


def _options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    known = {"minutes": "9", "sizes": "", "repeats": "3", "json": ""}
    rest = []
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            rest.append(arg)
        elif key in known and equals:
            known[key] = value
        else:
            raise UserError(f"{arg} is no option; there are --minutes=, --sizes=, --repeats=, --json=")
    return known, rest


def _sizes(text: str, scale: str) -> list[tuple[int, int, int]]:
    if not text:
        return list(SIZES[scale])
    sizes = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(n.isdigit() for n in numbers) or int(numbers[0]) % 8 != 1:
            raise UserError(f"--sizes={part} is no FxHxW with 8k+1 LR frames, like 25x384x640")
        sizes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return sizes


def _number(options: Mapping[str, str], key: str) -> float:
    try:
        value = float(options[key])
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UserError(f"--{key}={options[key]} is no number above 0")
    return value


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = _options(argv)
    if not any(a.startswith("stage=") for a in rest):
        rest = ["stage=1..3", *rest]
    names, overrides = rewrite(rest)
    if wrong := {"vae", "decoder"} & set(names):
        raise UserError(f"train.bench measures stages 1, 2 and 3, not {wrong.pop()}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fixed = ["micro_batch_size=1", "global_batch_size=1", "log.quiet=true", "data.slots=null"]
    configs = []
    for name in names:
        one = [f"stage.{key}=false" for key in ("random_window", "random_history") if name != "teacher"]
        one += ["stage.loss.lpips=0"] if name == "one_step" and not has_lpips() else []
        configs.append(compose_yaml(name, [*fixed, *one, *overrides]))
    campaign = Campaign(device, _number(options, "minutes"), int(_number(options, "repeats")))
    dtype = torch.bfloat16 if configs[0].precision == "bf16" else torch.float32
    campaign.rate = measure.matmul_rate(device, dtype)
    print(f"{measure.machine()}\n{campaign.head()}", flush=True)
    sizes = _sizes(options["sizes"], configs[0].scale.preset)
    for config in configs:
        run_stage(campaign, config, sizes)
    _print(campaign, configs[0])
    if options["json"]:
        rows = {"machine": measure.machine(), "matmul_per_second": campaign.rate, "lpips": has_lpips()}
        with atomic(Path(options["json"])) as part:
            part.write_text(json.dumps(rows | {"rows": [asdict(row) for row in campaign.rows]}, indent=1))
    return 0


def _print(campaign: Campaign, config: TrainConfig) -> None:
    print(f"\nOne sample a step, {config.precision}, windows of stages 2 and 3 at their widest, latents "
          f"encoded in the step, {'with' if has_lpips() else 'WITHOUT'} LPIPS. MFU and HFU are of "
          f"{campaign.rate / 1e12:.3g} TFLOP/s, what a matrix product reaches here.")  # fmt: skip
    print(campaign.head())
    for row in campaign.rows:
        print(campaign.cells(row))


if __name__ == "__main__":
    cli.run(main)
