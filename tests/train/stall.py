"""How long a checkpoint stops training: written at once, by a thread, and what copying alone takes.

    python -m tests.train.stall [scale=small] [key=value ...]

A VAE with its optimiser and EMA is saved in turns both ways; medians over REPEATS.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import build
from flashvsr.base import cli, measure
from train.config import compose
from train.launch import init_group
from train.resume import Checkpoints, Position
from train.stages import make_stage

REPEATS = 5


def main(argv: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="stall-") as folder:
        given = ["scale=small", "optim.ema=0.9", f"runs_dir={folder}", f"data.shards={folder}/data"]
        small = ["data.height=64", "data.width=64", "data.short_side=96", "data.latents_per_clip=2"]
        config = compose("vae", [*given, *small, *argv])
        build.build([], Path(folder) / "data", synthetic_clips=3, quiet=True)
        stage = make_stage(config, init_group(config.device))
        engine = stage.roles[stage.main]
        for parameter in engine.trained().values():
            parameter.grad = torch.ones_like(parameter)
        engine.step(1e-5)  # from now on there are moments
        ways = {}
        for asynchronous in (False, True):
            stage.config = replace(config, async_save=asynchronous)
            ways[asynchronous] = Checkpoints(stage, Path(folder) / f"saves-{asynchronous}")
        tensors = [
            t
            for part in (engine.weights(), engine.optimizer_state(), stage.ema.shadow)
            for t in part.values()
        ]
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]
        seconds: dict[str, list[float]] = {"copy": [], "save": [], "async_save": []}
        for step in range(1, REPEATS + 2):  # the first round warms up: it also takes the host memory
            works = {
                "copy": partial(_copy, host, tensors),
                "save": partial(ways[False].save, Position(step)),
                "async_save": partial(ways[True].save, Position(step)),
            }
            for name, work in works.items():
                seconds[name].append(measure.timed(work)[1])
            ways[True].wait()
        ways[True].__exit__(None, None, None)
    size = sum(t.nbytes for t in tensors) / 1e6
    print(f"{size:.0f} MB on {stage.device}, {measure.machine()}")
    for name, values in seconds.items():
        print(f"{name:<11} {1e3 * statistics.median(values[1:]):8.1f} ms")
    return 0


def _copy(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for host, tensor in zip(to, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)


if __name__ == "__main__":
    cli.run(main)
