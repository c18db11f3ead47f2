"""One rank of test_parallel: every way of running a stage takes the same steps, stops after the first, and
goes on as another. `python -m tests.train.parallel_worker JOB.json` under `train.launch.spawn`; rank 0 writes
the numbers."""

import json
import sys
import warnings
from pathlib import Path

import torch

from flashvsr.models import dit
from train import loop
from train.config import compose
from train.launch import init_group, teardown
from train.resume import Checkpoints, Position
from train.stages import make_stage

STEPS = 2


def batches(stage, world):
    """Per step, this rank's micro-batches: of the global samples in order, every rank's turn."""
    clips, size = stage.feed.clips("train"), stage.config.micro_batch_size
    for step in range(STEPS):
        first = step * stage.config.global_batch_size
        counters = range(first + world.rank, first + stage.config.global_batch_size, world.size)
        samples = [clips.sample(counter) for counter in counters]
        yield [together(samples[i : i + size]) for i in range(0, len(samples), size)]


def together(samples):
    segments = zip(*(s["segments"] for s in samples), strict=True)
    return {
        "ids": [s["id"] for s in samples],
        "counters": torch.tensor([s["counter"] for s in samples]),
        "segments": [{k: torch.stack([s[k] for s in group]) for k in group[0]} for group in segments],
    }


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
    if engine.size > 1 and engine.skeleton is not None and not stage.world.is_main:
        assert not parts["weights"] and not parts["ema"], "what is saved is for the main rank"
    return {
        name: {k: t.double().square().sum().item() for k, t in part.items()} for name, part in parts.items()
    }


def one(name, overrides, world, start=0, resumed=None, saved=None):
    """A stage's two steps, or its second from where `resumed` stands: numbers."""
    stage = make_stage(compose(name, overrides), world)
    if resumed is not None:
        assert Checkpoints(stage, resumed).restore().step == start
    return {"records": take(stage, world, start, saved), **weights(stage)}


def run(job, world):
    """`job`: out, overrides, ways (stage, way and its overrides), resumes (stage, way, way)."""
    out, results = Path(job["out"]), {}
    # whatever is compiled is traced, guarded and run as it was traced: generating code takes minutes
    dit._compiled = {
        part: torch.compile(getattr(dit.Block, part), dynamic=False, backend="eager")
        for part in ("before", "after")
    }.__getitem__
    ways = {(stage, way): overrides for stage, way, overrides in job["ways"]}
    for (stage, way), overrides in ways.items():
        if world.is_main:
            print(stage, way, flush=True)
        saved = out / "saved" / f"{stage}-{way}-{world.size}"
        results[f"{stage} {way}"] = one(stage, [*job["overrides"], *overrides], world, saved=saved)
    for stage, first, second in job["resumes"]:
        resumed = out / "saved" / f"{stage}-{first}-{world.size}"
        overrides = [*job["overrides"], *ways[stage, second]]
        results[f"{stage} {first}->{second}"] = one(stage, overrides, world, 1, resumed)
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    world = init_group("cpu")
    try:
        job = json.loads(Path(sys.argv[1]).read_text())
        results = run(job, world)
        if world.is_main:
            (Path(job["out"]) / "results.json").write_text(json.dumps(results))
    finally:
        teardown()
