"""Ways to run a role: on one process, copied to every rank, or sharded over them."""

from __future__ import annotations

from torch import nn

from train.launch import World
from train.parallel.engine import Engine, Optimizer


def make_engine(
    kind: str, module: nn.Module, build_optimizer: Optimizer, clip: float, world: World
) -> Engine:
    """The engine of `parallel.kind` (ddp, fsdp2, zero1, zero2, zero3); one process needs none of them."""
    if world.size == 1:
        return Engine(module, build_optimizer, clip)
    if kind == "ddp":
        from train.parallel.ddp import DdpEngine

        return DdpEngine(module, build_optimizer, clip, world)
    if kind == "fsdp2":
        from train.parallel.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(module, build_optimizer, clip, world)
    from train.parallel.zero import ZeroEngine

    return ZeroEngine(module, build_optimizer, clip, world, level=int(kind.removeprefix("zero")))
