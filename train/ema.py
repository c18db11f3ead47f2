"""Exponential moving average of a role's trained weights, in float32 whatever the weights' dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flashvsr.base.cli import UserError

# The number of updates travels with the shadows: the warm-up of the decay depends on it.
UPDATES = "ema/updates"


class Ema:
    """shadow ← d·shadow + (1−d)·weight, with d = `decay_at(updates so far)`.

    `named` are the live tensors by name (local shards under a sharding engine); `shadow` holds float32 copies
    on the same devices under the same names.
    """

    def __init__(self, named: Mapping[str, Tensor], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"ema decay is {decay}: give a number from 0 up to, but not including, 1")
        self.decay = decay
        self.updates = 0
        self.shadow = {n: t.detach().to(torch.float32, copy=True) for n, t in named.items()}

    def decay_at(self, step: int) -> float:
        """min(decay, (1+step)/(10+step)): early averages forget the initial weights quickly."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, named: Mapping[str, Tensor]) -> None:
        """Moves every shadow towards the live tensor of its name; the names must be those of construction."""
        assert named.keys() == self.shadow.keys(), sorted(named.keys() ^ self.shadow.keys())
        weight = 1.0 - self.decay_at(self.updates)
        live = [named[name].detach().float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), live, weight)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows by name, and `ema/updates`."""
        return {**self.shadow, UPDATES: torch.tensor(self.updates, dtype=torch.int64)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            UserError: a name is missing, unknown, or of another shape; nothing is changed then.
        """
        wanted = self.shadow.keys() | {UPDATES}
        if different := sorted(wanted ^ state.keys()):
            kind = "misses" if different[0] in wanted else "has the unknown"
            raise UserError(f"the saved EMA {kind} {different[0]!r} ({len(different)} names differ)")
        for name, shadow in self.shadow.items():
            if state[name].shape != shadow.shape:
                raise UserError(
                    f"the saved EMA of {name!r} is {tuple(state[name].shape)}, not {tuple(shadow.shape)}"
                )
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])
        self.updates = int(state[UPDATES])
