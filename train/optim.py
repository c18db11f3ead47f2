"""Optimiser and learning-rate schedule: one AdamW per trained role, one closed formula per schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

Schedule = Literal["constant", "cosine"]

# Device types whose AdamW torch implements as one fused kernel.
FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}

ROW = 1024  # values of a gradient that are summed in float32


def decays(name: str, param: Parameter) -> bool:
    """Whether weight decay applies: matrices and kernels, not biases, norm gains and AdaLN modulation."""
    return param.ndim > 1 and not name.endswith("modulation")


def build_optimizer(
    named_params: Mapping[str, Parameter],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the parameters that require a gradient.

    Two groups: those of `decays` with `weight_decay`, the rest without. Fused wherever torch has the kernel,
    so the same state layout (float32 step on the parameter's device) holds on CPU and GPU.
    """
    trained = {name: param for name, param in named_params.items() if param.requires_grad}
    assert trained, "an optimiser needs at least one trained parameter"
    groups = [
        {"params": [p for n, p in trained.items() if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in trained.values())
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=fused)


def squared_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Sum of squares, float64: in float32 over `ROW` values each, then in float64, right to about 1e-8. In
    float32 torch's sum over a large tensor is off by 1e-4 on a CPU, and the same gradient cut into shards
    would clip differently; all in float64 takes ten times as long."""
    gradients = list(gradients)
    norms = [gradients[0].new_zeros(1, dtype=torch.float32)]  # on the device, also where a shard is empty
    for g in gradients:
        flat = g.reshape(-1)
        whole = flat.numel() // ROW * ROW
        for rows in (flat[:whole].view(-1, ROW), flat[whole:][None]):
            if rows.numel():
                norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
    return torch.cat(norms).double().square().sum()


def clip_gradients(gradients: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scales, in place, gradients of total `norm` down to `limit`."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0).item()
    if scale < 1.0:
        torch._foreach_mul_(list(gradients), scale)


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Sets the learning rate of every group; call it before each step with `lr_at`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(
    step: int, *, base: float, warmup: int, total: int, schedule: Schedule, floor: float = 0.0
) -> float:
    """Learning rate of `step` (0 is the first) in closed form, so that resuming needs no scheduler state.

    Linear warm-up base·(step+1)/warmup for step < warmup; after it `base` ("constant") or half a cosine from
    `base` down to `floor`, reached at step = total ("cosine"). `floor` is a learning rate like `base`.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    assert schedule == "cosine", schedule
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (base - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
