"""Flow matching: the squared error of the velocity (Lipman et al. 2023; paper section 3.2).

x_sigma = (1 - sigma) x0 + sigma eps        L = mean (v_hat - (eps - x0))^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashvsr.flow import velocity


def per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch: `B ...` -> `B`, in float32."""
    return x.float().flatten(1).mean(1)


def segment_errors(predicted: Sequence[Tensor], x0: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
    """Mean squared velocity error of every segment, `B S`."""
    errors = [
        per_sample((v.float() - velocity(clean, eps)).square())
        for v, clean, eps in zip(predicted, x0, noise, strict=True)
    ]
    return torch.stack(errors, 1)


def flow_matching(predicted: Sequence[Tensor], x0: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
    """The loss per sample, `B`: every segment counts the same, whatever its size.

    predicted, x0, noise: per segment, `B 16 f h w`.
    """
    return segment_errors(predicted, x0, noise).mean(1)
