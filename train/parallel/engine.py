"""A role's engine: forward, accumulate, backward, step, and its state. This one runs on one process.

Other ways of running a role subclass it and keep its eight methods; stages and loop know nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.checkpoint import load_optimizer, optimizer_tensors
from train.optim import set_lr


class Engine:
    """`module` with its optimiser. Gradients of all ranks add up: losses carry 1/global_count themselves."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, clip: float):
        self.module, self.optimizer, self.clip = module, optimizer, clip
        self.wrapped: nn.Module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        return self.wrapped(*args, **kwargs)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; `last` of the step."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Clips, steps, clears the gradients; returns the gradient norm before clipping."""
        norm = self._clip()
        set_lr(self.optimizer, lr)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(list(self.trained().values()), self.clip)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, as this process holds them (local shards where sharded)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """The whole module's weights by name."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole optimiser state, by parameter name."""
        return optimizer_tensors(self.optimizer, self.trained())

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Restores both, strictly."""
        self.module.load_state_dict(dict(weights), strict=True)
        load_optimizer(self.optimizer, self.trained(), optimizer_state)
