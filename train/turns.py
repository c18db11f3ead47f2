"""What a loss hands to the loop, and how the loop turns it into a gradient.

A loss runs its role, detaches the role's outputs (`Losses.of`), and computes one value per sample and term on
the detached copy. The loop differentiates the terms down to that copy, each by itself where the stage says so
(its norm is the logged gradient norm of the term: local, no collective), frees what lies behind it (decoder,
LPIPS, teacher), and sends the weighted sum back through the role as sum(output * gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Losses:
    """Values per sample and term (`B` each), at copies of a role's outputs."""

    outputs: list[Tensor]
    at: list[Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> Losses:
        """Around a role's outputs: compute the terms on `losses.at`."""
        return cls(list(outputs), [out.detach().requires_grad_() for out in outputs])

    def add(self, name: str, values: Tensor, weight: float = 1.0) -> None:
        """A term: `values` of shape `B`, computed on `at`."""
        assert values.ndim == 1, f"{name}: one value per sample, got {tuple(values.shape)}"
        self.terms[name], self.weights[name] = values, weight


@dataclass(frozen=True)
class Reduced:
    """One micro-batch's share: the tensor to send back, sums of values, squared gradient norms per term (none
    where terms were not taken apart).

    Sums are float64 scalars where the outputs lie: a GPU is waited for once a turn, not once a term.
    """

    surrogate: Tensor
    values: dict[str, Tensor]
    squares: dict[str, Tensor]


def reduce(losses: Losses, global_count: int, apart: bool = True) -> Reduced:
    """Weights every sample by 1/global_count and differentiates the terms at the role's outputs, each by
    itself (`apart`, and where there is only one) or their sum."""
    total = [torch.zeros_like(leaf) for leaf in losses.at]
    values = {name: value.detach().double().sum() / global_count for name, value in losses.terms.items()}
    shares = {name: losses.weights[name] * value.sum() / global_count for name, value in losses.terms.items()}
    if together := not apart and len(shares) > 1:
        shares = {"all": sum(shares.values())}
    squares, last = {}, list(shares)[-1]
    for name, share in shares.items():
        gradients = torch.autograd.grad(share, losses.at, retain_graph=name != last, allow_unused=True)
        squares[name] = torch.zeros((), dtype=torch.float64, device=share.device)
        for whole, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                whole += gradient
                squares[name] += gradient.double().square().sum()
    surrogate = sum((out.float() * g.float()).sum() for out, g in zip(losses.outputs, total, strict=True))
    return Reduced(surrogate, values, {} if together else squares)
