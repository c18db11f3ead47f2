"""MFU and HFU of a step: the operations it needed, and those it executed, over what the devices could do.

    MFU = useful operations / (seconds x devices x peak)        HFU = executed operations / (the same)

Useful: every product that forward and backward of the turns taken need, attention by its visible pairs only,
nothing twice. Executed: with what is computed again (activation checkpointing, a fused attention's scores).
Counted once, from sizes (`train.work`); `seconds` is the whole step, waiting included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from flashvsr.base.measure import matmul_rate
from train import footprint, work
from train.config import TrainConfig
from train.estimate import GPUS
from train.stages.shared import Stage

# Names that torch gives devices -> rows of the table. H100 as PCIe card or NVL has another peak than SXM.
DEVICES = {
    r"A100.*40GB": "a100-40g",
    r"A100.*80GB": "a100-80g",
    r"H100( 80GB HBM3| SXM.*)?$": "h100-80g",
    r" H200$": "h200-141g",
    r" B200$": "b200-180g",
    r"RTX 3090$": "rtx3090-24g",
    r"RTX 4090$": "rtx4090-24g",
    r"L40S$": "l40s-48g",
}


class Efficiency:
    """Work of a stage's turns per sample, counted at the start, and the peak it is compared with.

    turns: "prepare" and each role -> (useful, executed) operations of a sample; tokens: of a sample (0 where
    no DiT learns); peak: operations per second of one device, None when it is not known.
    """

    def __init__(self, stage: Stage):
        config = stage.config
        grids = work.grids(config)
        self.turns = work.turns(config, stage.sizes, grids, _lpips(config))
        self.tokens = 0 if config.stage.name in ("vae", "decoder") else sum(map(math.prod, grids))
        self.samples, self.devices = config.global_batch_size, stage.world.size
        self.peak, self.description = peak(config, stage.device)

    def record(self, roles: Sequence[str], seconds: float) -> dict[str, float]:
        """Of a step in which `roles` took their turns: tokens and operations of all ranks, MFU and HFU."""
        parts = [self.turns[part] for part in ("prepare", *roles) if part in self.turns]
        useful, executed = work.times(work.total(parts), self.samples)
        record = {"useful_operations": float(useful), "executed_operations": float(executed)}
        if self.tokens:
            record["tokens"] = self.tokens * self.samples
        if self.peak is not None:
            possible = seconds * self.devices * self.peak
            record |= {"mfu": useful / possible, "hfu": executed / possible}
        return record


def peak(config: TrainConfig, device: torch.device) -> tuple[float | None, str]:
    """Operations per second of one device at this run's precision, and where the number comes from."""
    given = config.log.peak
    precision = config.precision
    if given == "measure":
        rate = matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        return rate, f"{rate / 1e12:.3g} TFLOP/s measured ({precision} matrix product)"
    if given != "auto":
        return given * 1e12, f"{given:g} TFLOP/s given"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if name is None or (row := data_sheet(name)) is None:
        return None, "peak unknown, no MFU (log.peak=measure takes one)"
    rate = GPUS[row].bf16 if precision == "bf16" else GPUS[row].fp32
    return rate * 1e12, f"{rate:g} TFLOP/s ({precision} peak of {row})"


def data_sheet(name: str) -> str | None:
    """The row of `train.estimate.GPUS` for a device's name as torch gives it."""
    return next((row for pattern, row in DEVICES.items() if re.search(pattern, name)), None)


def _lpips(config: TrainConfig) -> work.Operations:
    """Of one pair of frames."""
    s = config.stage
    if s.name in ("teacher", "sparse_causal"):
        return 0, 0
    side = (s.crop, s.crop) if s.name == "vae" else (config.data.height, config.data.width)
    with footprint.on_fake_gpu():
        return work.lpips(footprint.make_lpips(config), *side)
