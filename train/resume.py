"""Where a stage stands: saving all of it, going on from there, refusing what does not continue it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json
from train import checkpoint
from train.config import TrainConfig
from train.stages.shared import Stage

# Settings that may differ between a checkpoint and the run that continues it: they do not touch the maths.
FREE = {
    "runs_dir", "save_every", "validate_every", "keep_last", "resume", "log", "parallel", "micro_batch_size",
    "checkpointing", "device", "expect", "data.workers", "stage.attention", "data.cache_dir", "data.cache_gb",
}  # fmt: skip


def finished(config: TrainConfig) -> bool:
    """Whether this stage already left its model, with all the steps asked for."""
    path = config.stage_dir / "export" / "flashvsr.json"
    if config.resume != "auto" or not path.exists():
        return False
    return read_json(path)["info"]["provenance"].get("steps") == config.steps


def save(stage: Stage, folder: Any, step: int) -> None:
    """A checkpoint of every role, its optimiser and the EMA."""
    parts: dict[str, Mapping[str, torch.Tensor]] = {}
    for role, engine in stage.roles.items():
        parts[role] = engine.weights()
        parts[f"{role}.optimizer"] = engine.optimizer_state()
    if stage.ema is not None:
        parts[f"{stage.main}.ema"] = stage.roles[stage.main].gather(stage.ema.state_dict())
    if stage.world.is_main:
        meta = {"stage": stage.config.stage.name, "config": asdict(stage.config)}
        checkpoint.save(folder, step, parts, json.loads(json.dumps(meta)), stage.config.keep_last)
    stage.world.barrier()


def restore(stage: Stage, folder: Any) -> int:
    """Loads the newest checkpoint; returns the step to go on from (0: none)."""
    config = stage.config
    path = checkpoint.latest(folder)
    if path is None:
        return 0
    if config.resume == "never":
        raise UserError(f"{config.stage_dir} already holds a run: give another run=NAME or resume=auto")
    restored = checkpoint.load(path, stage=config.stage.name)
    changes = changed(restored.meta["config"], json.loads(json.dumps(asdict(config))))
    if changes and config.resume != "force":
        raise UserError(
            f"{config.stage_dir} was made with other settings: {'; '.join(changes)}; "
            "give another run=NAME, or resume=force to continue all the same"
        )
    for role, engine in stage.roles.items():
        engine.load(restored.take(role), restored.take(f"{role}.optimizer"))
    if stage.ema is not None:
        shadow = stage.roles[stage.main].shard(restored.take(f"{stage.main}.ema"))
        stage.ema.load_state_dict(shadow)
    restored.finish()
    return restored.step


def changed(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that alter the maths and differ, as `key: old -> new`."""
    differences = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{where}{key}"
        if name in FREE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differences += changed(a, b, f"{name}.")
        elif a != b:
            differences.append(f"{name}: {a} -> {b}")
    return differences
