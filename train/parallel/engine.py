"""A role's engine: forward, accumulate, backward, step, and its state. This one runs on one process.

Other ways of running a role subclass it and keep its methods; stages and loop know nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.checkpoint import load_optimizer, optimizer_tensors
from train.optim import clip_gradients, set_lr, squared_norm

Optimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.AdamW]  # from parameters by name


class Engine:
    """`module` with its optimiser. Gradients of all ranks add up: losses carry 1/global_count themselves.

    An engine that averages gradients over ranks sets `size` to their number. One that slices the weights sets
    `skeleton` (`without_weights`) before it does, and calls `forget` when they are about to change.
    """

    size = 1
    skeleton: nn.Module | None = None
    _whole: nn.Module | None = None

    def __init__(self, module: nn.Module, build_optimizer: Optimizer, clip: float):
        self.module, self.clip = module, clip
        self.optimizer = build_optimizer(dict(module.named_parameters()))
        self.lr = self.optimizer.defaults["lr"]  # before the schedule
        self.count = sum(p.numel() for p in module.parameters() if p.requires_grad)
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
        self._differentiate(loss * self.size)

    def _differentiate(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        """Clips, steps, clears the gradients; returns the gradient norm before clipping."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = self._squares(gradients).sqrt()
        set_lr(self.optimizer, lr)
        if torch.isfinite(norm):
            clip_gradients(gradients, norm, self.clip)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def _squares(self, gradients: Sequence[Tensor]) -> Tensor:
        return squared_norm(gradients)

    def trained(self) -> dict[str, Tensor]:
        """Trained parameters by name, as this process holds them (local shards where sharded)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def whole(self) -> nn.Module:
        """The module with whole weights, to use without gradient; the same one until the next step.

        Where weights are sharded every rank must call it.
        """
        if self.skeleton is None:
            return self.module
        if self._whole is None:
            self._whole = copy.deepcopy(self.skeleton)
            self._whole.load_state_dict(self._gathered(), strict=True, assign=True)
            self._whole.eval()
        return self._whole

    def forget(self) -> None:
        """Drops the copy that `whole` made."""
        self._whole = None

    # What is saved is for the main rank. Where it is sliced, every rank must call: tensors become whole one
    # at a time, the main rank keeps them in host memory, the others nothing: they return an empty mapping.

    def weights(self) -> dict[str, Tensor]:
        """The whole module's weights by name."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}

    def _gathered(self) -> dict[str, Tensor]:
        """`weights`, on every rank and on its device."""
        return self.weights()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole optimiser state, by parameter name."""
        return optimizer_tensors(self.optimizer, self.trained())

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Restores both, strictly."""
        self.module.load_state_dict(dict(weights), strict=True)
        load_optimizer(self.optimizer, self.trained(), optimizer_state)

    def gather(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors laid out like `trained()` -> whole ones; names that are no parameters stay as they are."""
        return dict(named)

    def shard(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `gather`."""
        return dict(named)


def on_main(named: Iterable[tuple[str, Tensor]], main: bool) -> dict[str, Tensor]:
    """Whole tensors, made one at a time by the iterable, in the main rank's host memory; elsewhere none."""
    kept = {}
    for name, tensor in named:
        if main:
            kept[name] = tensor.cpu()
    return kept


def without_weights(module: nn.Module) -> nn.Module:
    """A copy that shares no weight: parameters empty on the meta device, buffers (the prompt's keys and
    values, statistics) copied."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in module.parameters()
    }
    return copy.deepcopy(module, empty)
