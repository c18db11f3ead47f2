"""`python -m train stage=vae|1|2|3|1..3|decoder scale=tiny|small|wan1.3b [key=value ...]`.

One run per stage, in order, each in fresh processes, stopping at the first failure.
"""

from __future__ import annotations

import os

from flashvsr.base import cli
from train.config import compose, rewrite

HELP = f"""{__doc__}
Needs shards (`python -m data build`). Writes runs/NAME/<stage>/: config.yaml, metrics.jsonl, checkpoints,
samples, and export, the model. The same command continues a stopped run. Keys: configs/train.yaml, e.g.

  run=NAME runs_dir=DIR steps=N seed=S global_batch_size=N save_every=N validate_every=N data.shards=DIR
  resume=auto|never|force init=MODEL_FOLDER teacher=MODEL_FOLDER recipe=paper log.wandb=true
"""


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    stages, overrides = rewrite(argv)
    if "WORLD_SIZE" in os.environ:
        return worker(stages, overrides)
    from train.launch import processes, spawn

    for stage in stages:
        config = compose(stage, overrides)  # a mistake in the command ends here, before any process starts
        code = spawn([f"stage={stage}", *overrides], processes(config.parallel.processes))
        if code:
            return code
    return 0


def worker(stages: list[str], overrides: list[str]) -> int:
    """One rank of one stage."""
    from train.launch import init_group, teardown
    from train.loop import run

    if len(stages) != 1:
        raise cli.UserError("under torchrun, srun or accelerate give one stage per launch")
    config = compose(stages[0], overrides)
    world = init_group(config.device)
    try:
        return run(config, world)
    finally:
        teardown()


if __name__ == "__main__":
    cli.run(main)
