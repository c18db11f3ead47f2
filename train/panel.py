"""What one looks at in a distillation run: the same held-out clip at every validation.

    HR | student | teacher's estimate | fake score's estimate | where DMD pushes

The losses of DMD do not tell whether it works; these pictures and the numbers beside them do. Both estimates
are of the student's own output at one noise level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashvsr.base.draws import Draw
from flashvsr.base.resize import to_uint8
from flashvsr.flow import add_noise, denoised
from train.losses.dmd import dmd_direction
from train.losses.flow_matching import flow_matching
from train.stages.feed import Inputs
from train.stages.sparse_causal import INFERENCE_WINDOW

if TYPE_CHECKING:
    from train.stages.one_step import OneStep

SIGMA = 0.5  # of the estimates that are shown
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the fake score's error


@torch.no_grad()
def look(stage: OneStep, inputs: Inputs, draw: Draw) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Numbers and pictures of one clip; all ranks call it (weights may be sharded).

    Numbers: panel/saturation, panel/contrast (student's over HR's), panel/direction (mean |g|),
    panel/gap (mean |x_fake - x_real|), panel/fake@SIGMA (the fake score's flow-matching error there).
    Pictures: uint8 `H W 3` of the middle frame.
    """
    z = stage.student(stage.roles["student"].whole(), inputs, draw, INFERENCE_WINDOW)
    noise, middle = stage.noise(draw, "panel.noise", z), z.shape[2] // 2
    hr = inputs.hr[0][0, :, 4 * middle].float()
    numbers, pictures = {}, {"HR": hr, "student": _frame(stage, z, middle)}
    numbers["panel/saturation"] = saturation(pictures["student"]) / max(saturation(pictures["HR"]), 1e-6)
    numbers["panel/contrast"] = contrast(pictures["student"]) / max(contrast(pictures["HR"]), 1e-6)
    if stage.teacher is None:
        return numbers, _shown(pictures)
    fake = stage.roles["fake"].whole()
    real, guess = (_estimate(stage, role, m, z, noise, SIGMA, inputs)
                   for role, m in (("teacher", stage.teacher), ("fake", fake)))  # fmt: skip
    pictures |= {"teacher": _frame(stage, real, middle), "fake score": _frame(stage, guess, middle)}
    direction = dmd_direction(z, real, guess)
    numbers["panel/direction"] = direction.abs().mean().item()
    numbers["panel/gap"] = (guess - real).abs().mean().item()
    for sigma in SIGMAS:
        numbers[f"panel/fake@{sigma}"] = _fake_error(stage, fake, z, noise, sigma, inputs)
    return numbers, _shown(pictures) | {"DMD pushes": _heat(direction[0, :, middle], hr.shape[1:])}


def saturation(frame: Tensor) -> float:
    """Mean of max - min over the channels of a frame `3 H W` in [-1,1], clamped; 0 is grey, 2 the most."""
    x = frame.clamp(-1, 1)
    return (x.amax(0) - x.amin(0)).mean().item()


def contrast(frame: Tensor) -> float:
    """Standard deviation of the mean of the channels of a frame `3 H W` in [-1,1], clamped."""
    return frame.clamp(-1, 1).mean(0).std(correction=0).item()


def _point(z: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    level = torch.full((len(z),), sigma, device=z.device)
    return add_noise(z, noise, level), level


def _velocity(stage: OneStep, role: str, module: Any, point: Tensor, level: Tensor, inputs: Inputs) -> Tensor:
    plan = stage.dense_plan([point], stage.sizes.dit.head_dim)
    with stage.autocast():
        (v,) = module([point], level[:, None], plan, **stage.features_of(role, inputs))
    return v.float()


def _estimate(
    stage: OneStep, role: str, module: Any, z: Tensor, noise: Tensor, sigma: float, inputs: Inputs
) -> Tensor:
    point, level = _point(z, noise, sigma)
    return denoised(point, _velocity(stage, role, module, point, level, inputs), level)


def _fake_error(stage: OneStep, fake: Any, z: Tensor, noise: Tensor, sigma: float, inputs: Inputs) -> float:
    point, level = _point(z, noise, sigma)
    v = _velocity(stage, "fake", fake, point, level, inputs)
    return flow_matching([v], [z], [noise]).mean().item()


def _frame(stage: OneStep, z: Tensor, latent: int) -> Tensor:
    """The last frame of one latent of `1 16 n h w`, `3 H W` in [-1,1]."""
    return stage.vae_frames(z, latent, 1)[0, :, -1].float()


def _shown(pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: to_uint8(x).movedim(0, -1).cpu() for name, x in pictures.items()}


def _heat(direction: Tensor, size: Sequence[int]) -> Tensor:
    """mean |g| over the channels of a latent `16 h w`, white where largest, at the size of a frame."""
    strength = direction.abs().mean(0)
    grey = (255 * strength / strength.max().clamp_min(1e-12)).round().to(torch.uint8).cpu()
    rows, columns = (side // cells for side, cells in zip(size, grey.shape, strict=True))
    return grey.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[..., None].expand(-1, -1, 3)
