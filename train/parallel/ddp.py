"""DistributedDataParallel: a whole copy of the role on every rank, gradients added up."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.launch import World
from train.parallel.engine import Engine, Optimizer


class DdpEngine(Engine):
    def __init__(self, module: nn.Module, build_optimizer: Optimizer, clip: float, world: World):
        super().__init__(module, build_optimizer, clip)
        devices = [world.device] if world.device.type == "cuda" else None
        with warnings.catch_warnings():  # the argument's successor is not in torch 2.11
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self.wrapped = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
        self.size = world.size

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self.wrapped.no_sync():
            yield
