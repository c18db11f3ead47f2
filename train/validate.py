"""Held-out clips, judged by the functions of `eval` and through the methods that serve inference.

Every validation uses the same clips and the same draws, so that two values of one run compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics import psnr, ssim
from flashvsr.base.draws import Draw
from flashvsr.base.files import atomic
from flashvsr.base.resize import bicubic_8bit

if TYPE_CHECKING:
    from train.stages.shared import Stage

VALIDATION_STEP = -1  # the step of all validation draws


def run_method(method: Any, sample: Mapping[str, Any]) -> Tensor:
    """LR frames of a sample through a method with push and flush -> uint8 `F H W 3`, as many as HR has."""
    frames = sample["segments"][0]["lr"].permute(1, 2, 3, 0).numpy()
    parts = [method.push(frames), method.flush()]
    sr = torch.from_numpy(np.concatenate([np.asarray(p) for p in parts]))
    return sr[: len(frames) - 4]


class Validation:
    """The held-out clips of a stage, loaded once."""

    def __init__(self, stage: Stage):
        self.stage = stage
        clips = stage.feed.clips("val")
        self.samples = [clips.sample(i) for i in range(stage.config.data.val_slots)]
        self.lpips = stage.lpips
        self.bicubic = self._bicubic()

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[dict[str, float], dict[str, Path]]:
        """val/loss, val/psnr, ... of the live model, bicubic's beside them; writes a picture."""
        stage, losses, frames = self.stage, [], []
        modes = {name: engine.module.training for name, engine in stage.roles.items()}
        for engine in stage.roles.values():
            engine.module.eval()
        for i, sample in enumerate(self.samples):
            draw = Draw(stage.config.seed, VALIDATION_STEP, [i])
            micro = {"segments": [{k: v[None] for k, v in s.items()} for s in sample["segments"]]}
            losses.append(stage.held_out(self._inputs(micro, draw), draw))
            if i < stage.config.data.val_pictures:
                frames.append(stage.upscaled(sample))
        for name, engine in stage.roles.items():
            engine.module.train(modes[name])
        media = {"picture": self._picture(step, frames)} if stage.world.is_main else {}
        record = {"val/loss": torch.cat(losses).mean().item()}
        return record | {f"val/{k}": v for k, v in self._scores(frames).items()} | self.bicubic, media

    def _inputs(self, micro: Mapping[str, Any], draw: Draw) -> Any:
        """Whole held-out clips: as training prepares them, but never cropped."""
        stage = self.stage
        return (
            stage.feed.inputs(micro, segments=1) if stage.frozen_vae is None else stage.prepare(micro, draw)
        )

    def _hr(self, sample: Mapping[str, Any]) -> Tensor:
        hr = sample["segments"][0]["hr"].permute(1, 2, 3, 0)
        return hr[: hr.shape[0] - 4]

    def _scores(self, frames: Sequence[Tensor]) -> dict[str, float]:
        scores: dict[str, list[float]] = {"psnr": [], "ssim": [], self.lpips.name: []}
        for sample, sr in zip(self.samples, frames, strict=False):
            hr = self._hr(sample)
            scores["psnr"].append(psnr(sr, hr))
            scores["ssim"].append(ssim(sr, hr))
            scores[self.lpips.name].append(self.lpips.clip(sr, hr))
        return {name: sum(values) / len(values) for name, values in scores.items()}

    def _bicubic(self) -> dict[str, float]:
        frames = []
        for sample in self.samples[: self.stage.config.data.val_pictures]:
            segment = sample["segments"][0]
            up = bicubic_8bit(segment["lr"], tuple(segment["hr"].shape[-2:]))
            frames.append(up.permute(1, 2, 3, 0)[: up.shape[1] - 4])
        return {f"bicubic/{name}": value for name, value in self._scores(frames).items()}

    def _picture(self, step: int, frames: Sequence[Tensor]) -> Path:
        """LR (enlarged) | SR | HR of each clip's middle frame, as samples/step-NNNNNN.png."""
        from PIL import Image

        rows = []
        for sample, sr in zip(self.samples, frames, strict=False):
            hr, middle = self._hr(sample), sr.shape[0] // 2
            scale = hr.shape[1] // sample["segments"][0]["lr"].shape[2]
            lr = sample["segments"][0]["lr"].permute(1, 2, 3, 0)[middle]
            big = lr.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            rows.append(torch.cat([big, sr[middle], hr[middle]], 1))
        folder = self.stage.config.stage_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        with atomic(path) as part:
            Image.fromarray(torch.cat(rows).numpy()).save(part, format="PNG")
        return path
