"""One rank of test_parallel: every kind of engine takes the same steps, stops after the first, and goes on as
another kind. `python -m tests.train.parallel_worker JOB.json` under `train.launch.spawn`; rank 0 writes the
numbers."""

import json
import sys
import warnings
from pathlib import Path

import torch

from train import loop
from train.config import compose
from train.launch import init_group, teardown
from train.resume import Checkpoints, Position
from train.stages import make_stage

STEPS = 2


def batches(stage, world):
    """Per step, this rank's micro-batches: the global samples in order, one by one."""
    clips = stage.feed.clips("train")
    per_rank = stage.config.global_batch_size // world.size
    for step in range(STEPS):
        first = step * stage.config.global_batch_size + world.rank
        samples = [clips.sample(first + i * world.size) for i in range(per_rank)]
        yield [
            {
                "ids": [s["id"]],
                "counters": torch.tensor([s["counter"]]),
                "segments": [{k: v[None] for k, v in segment.items()} for segment in s["segments"]],
            }
            for s in samples
        ]


def take(stage, world, start, folder=None):
    """Steps from `start` on; after the first one the state goes to `folder`. Records per step."""
    records = []
    for step, micros in enumerate(batches(stage, world)):
        if step < start:
            continue
        records.append(loop.train_step(stage, micros, step))
        if folder is not None and step == 0:
            Checkpoints(stage, folder).save(Position(step=1))
    return records


def weights(stage):
    """A fingerprint of the main role's whole weights and of its EMA."""
    engine = stage.roles[stage.main]
    parts = {"weights": engine.weights(), "ema": engine.gather(stage.ema.state_dict())}
    return {
        name: {k: t.double().square().sum().item() for k, t in part.items()} for name, part in parts.items()
    }


def run(job, world):
    out = Path(job["out"])
    results = {}
    for name, kinds in job["stages"].items():
        for kind in kinds:
            if world.is_main:
                print(name, kind, flush=True)
            saved = out / "saved" / f"{name}-{kind}-{world.size}"
            stage = make_stage(compose(name, [*job["overrides"], f"parallel={kind}"]), world)
            records = take(stage, world, 0, saved)
            results[f"{name} {kind}"] = {"records": records, **weights(stage)}
        for first, second in job["resumes"].get(name, []):
            saved = out / "saved" / f"{name}-{first}-2"
            stage = make_stage(compose(name, [*job["overrides"], f"parallel={second}"]), world)
            assert Checkpoints(stage, saved).restore().step == 1
            records = take(stage, world, 1)
            results[f"{name} {first}->{second}"] = {"records": records, **weights(stage)}
    if world.is_main:
        (out / f"results-{world.size}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    world = init_group("cpu")
    try:
        run(json.loads(Path(sys.argv[1]).read_text()), world)
    finally:
        teardown()
