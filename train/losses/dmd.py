"""Distribution matching distillation (Yin et al. 2024a, "DMD"; paper Eq. 2).

    z_sigma = (1 - sigma) z + sigma eps        x_real, x_fake = denoised estimates of teacher and fake score
    g = (x_fake - x_real) / mean |z - x_real|  per sample
    L = 1/2 mean (z - sg(z - g))^2             so that dL/dz = g / (number of entries of a sample)

What is not finite stays so, where DMD2 puts zeros in its place: a fault in either network must be seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.losses.flow_matching import per_sample


@torch.no_grad()
def dmd_direction(z: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """g of the equation above, `B 16 n h w` like its arguments: where the student must not go."""
    z, x_real, x_fake = z.float(), x_real.float(), x_fake.float()
    scale = per_sample((z - x_real).abs())
    return (x_fake - x_real) / scale.reshape(-1, *(1,) * (z.ndim - 1))


def dmd(z: Tensor, direction: Tensor) -> Tensor:
    """The loss per sample, `B`; its gradient with respect to z is `direction` over a sample's size."""
    target = (z.float() - direction).detach()
    return 0.5 * per_sample((z.float() - target).square())
