"""The one training loop. It takes turns over a stage's roles and never asks which stage it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flashvsr.base.cli import UserError
from flashvsr.base.draws import Draw
from flashvsr.base.files import atomic
from flashvsr.base.measure import machine
from flashvsr.weights.folder import save_model
from train.config import STAGES, TrainConfig, to_yaml
from train.efficiency import Efficiency
from train.guards import Guards, stop_broken
from train.launch import REQUEUE, World
from train.lock import run_lock
from train.optim import lr_at
from train.preemption import StopSignal
from train.profile import Profile
from train.resume import Checkpoints, Position, finished
from train.stages import make_stage
from train.stages.feed import Inputs
from train.stages.shared import Stage, relative
from train.telemetry import Telemetry, of_all_ranks
from train.trackers import start_trackers, versions
from train.turns import reduce
from train.validate import Validation


def run(config: TrainConfig, world: World) -> int:
    """Trains one stage to its end; returns the exit code (REQUEUE when told to stop)."""
    if finished(config):
        if world.is_main:
            print(f"{STAGES[config.stage.name]} of run {config.run} is complete: nothing to do")
        return 0
    with StopSignal() as stop:
        stage = make_stage(config, world)  # a missing earlier stage ends here, before anything is written
        with run_lock(config.stage_dir, world):
            return _train(stage, stop)


def _train(stage: Stage, stop: StopSignal) -> int:
    config, world = stage.config, stage.world
    accumulation = _accumulation(config, world)
    checkpoints = Checkpoints(stage, _checkpoints(config))
    position = checkpoints.restore()
    telemetry = _telemetry(stage, position)
    efficiency, guards = Efficiency(stage), Guards(config.data.workers)
    if world.is_main:
        _announce(stage, position.step, accumulation, efficiency)
    clips, validation = stage.feed.clips("train"), Validation(stage)
    if world.is_main:
        with atomic(config.stage_dir / "config.yaml") as part:
            part.write_text(to_yaml(config))
    profile = Profile(config, world)
    step, counter, stopped = position.step, position.counter, False
    with telemetry, checkpoints:
        for record in telemetry.resume(step if step else -1):
            guards.look(record["step"], record)
        if step == 0:
            telemetry.val(0, *validation(0))
        batches = stage.feed.batches(clips, counter)
        while step < config.steps and not stopped:
            profile.before(step + 1)
            begin = time.monotonic()
            micros = [next(batches) for _ in range(accumulation)]
            waited = time.monotonic() - begin
            roles = [role for role, _ in stage.turns(step)]
            record = train_step(stage, micros, step)
            step += 1
            counter += config.global_batch_size
            record |= {"counter": counter, "samples": config.global_batch_size}
            record |= of_all_ranks(world, waited, sum(len(micro["damaged"]) for micro in micros))
            record |= {"seconds": time.monotonic() - begin}
            record |= efficiency.record(roles, record["seconds"])
            marks, warnings = guards.look(step, record)
            telemetry.train(step, record | marks, warnings)
            profile.after(step, last=step == config.steps)
            stopped = stop.requested(world) and step < config.steps
            # Also at the first step: what does not fit into memory or cannot be written shows at once.
            if step % config.validate_every == 0 or step in (1, config.steps):
                telemetry.val(step, *validation(step))
            if step % config.save_every == 0 or step in (1, config.steps) or stopped:
                checkpoints.save(Position(step, counter, telemetry.wandb_id or position.wandb_id))
            if step == position.step + 1:  # what is compiled is compiled, and the ranks have just met
                world.set_timeout(config.parallel.timeout)
    if stopped:
        if world.is_main:
            print(f"stopped at step {step} by {stop.name}; the same command continues from there")
        return REQUEUE
    parts = stage.parts()  # gathers what is sharded: every rank takes part
    if world.is_main:
        path = save_model(config.stage_dir / "export", **parts)
        print(f"{STAGES[config.stage.name]} complete after {step} steps: {relative(path)}")
    world.barrier()
    return 0


def train_step(stage: Stage, micros: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """One step: every turn goes over all micro-batches, then its role steps. Returns what to log."""
    config, record = stage.config, {}
    draws = [Draw(config.seed, step, micro["counters"].tolist()) for micro in micros]
    inputs = [stage.prepare(micro, draw) for micro, draw in zip(micros, draws, strict=True)]
    for role, loss in stage.turns(step):
        engine = stage.roles[role]
        record |= _accumulate(stage, role, loss, inputs, draws, step, micros)
        o = config.optim
        lr = lr_at(step, base=engine.lr, warmup=o.warmup, total=config.steps, schedule=o.schedule)
        norm = engine.step(lr)
        record[f"grad_norm/{role}"] = norm
        if not math.isfinite(norm):
            stop_broken(f"the gradient of role {role}", step + 1, micros, stage.world, _checkpoints(config))
        if role == stage.main:
            record["lr"] = lr
            if stage.ema is not None:
                stage.ema.update(engine.trained())
    return record


def _accumulate(
    stage: Stage,
    role: str,
    loss: Any,
    inputs: Sequence[Inputs],
    draws: Sequence[Draw],
    step: int,
    micros: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Forward and backward of one turn; loss terms and gradient norms per term, over the global batch."""
    engine, world = stage.roles[role], stage.world
    sums: dict[str, torch.Tensor] = {}
    for i, (one, draw) in enumerate(zip(inputs, draws, strict=True)):
        with engine.accumulate(last=i == len(inputs) - 1):
            reduced = reduce(loss(one, draw), stage.config.global_batch_size, stage.apart(step))
            for name, value in reduced.values.items():
                sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0) + value
            for name, value in reduced.squares.items():
                sums[f"square/{name}"] = sums.get(f"square/{name}", 0) + value
            engine.backward(reduced.surrogate)
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names])
    totals = dict(zip(names, world.all_reduce_sum(values).tolist(), strict=True))
    for name, value in totals.items():
        if not math.isfinite(value):
            what = name.replace("square/", "the gradient of loss/")
            stop_broken(f"{what} of role {role}", step + 1, micros, world, _checkpoints(stage.config))
    record = {name: value for name, value in totals.items() if name.startswith("loss/")}
    for name, value in totals.items():
        if name.startswith("square/"):
            record[f"term_grad/{name.removeprefix('square/')}"] = math.sqrt(value)
    return record


def _checkpoints(config: TrainConfig) -> Path:
    return config.stage_dir / "checkpoints"


def _telemetry(stage: Stage, position: Position) -> Telemetry:
    """Of this stage from `position` on, with the trackers asked for, which are told what is really run."""
    config, world, name = stage.config, stage.world, STAGES[stage.config.stage.name]
    trackers = []
    if world.is_main:
        facts = {**asdict(config), "in_use": stage.in_use, "processes": world.size}
        facts |= {"machine": machine(), "versions": versions()}
        where = config.stage_dir, f"{config.run}-{name}"
        trackers = start_trackers(config.log, *where, facts, position.step, position.wandb_id)
    return Telemetry(
        config.stage_dir, name, config.steps,
        every=config.log.every, quiet=config.log.quiet, trackers=trackers, main=world.is_main,
    )  # fmt: skip


def _accumulation(config: TrainConfig, world: World) -> int:
    per_round = config.micro_batch_size * world.size
    if config.global_batch_size % per_round:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size="
            f"{config.micro_batch_size} x {world.size} processes; change one of them"
        )
    return config.global_batch_size // per_round


def _announce(stage: Stage, start: int, accumulation: int, efficiency: Efficiency) -> None:
    """What is in use, once."""
    config, world = stage.config, stage.world
    sizes = ", ".join(f"{role} {e.count / 1e6:.2f} M trained" for role, e in stage.roles.items())
    print(
        f"{STAGES[config.stage.name]} ({config.stage.name}) of run {config.run}: {sizes}; "
        f"batch {config.global_batch_size} = {config.micro_batch_size} x {world.size} processes x "
        f"{accumulation}; {config.precision} on {world.device}; "
        + "".join(f"{what}: {name}; " for what, name in stage.in_use.items())
        + f"{efficiency.description}; step {start} of {config.steps}",
        flush=True,
    )
