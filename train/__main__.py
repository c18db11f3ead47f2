"""`python -m train stage=vae|1|2|3|1..3|decoder scale=tiny|small|wan1.3b [key=value ...]`.

One run per stage, in order, each in fresh processes, stopping at the first failure.
"""

from __future__ import annotations

import os
import socket
import time

from flashvsr.base import cli
from train.config import STAGES, compose, rewrite

# Seconds that a rank keeps its error to itself where another one has more to say.
PATIENCE = 10.0

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
    from train.rendezvous import slurm_task

    task = slurm_task()
    if task is not None and not task.is_node:
        os.environ.update(task.place())
        return worker(stages, overrides)
    for index, stage in enumerate(stages):
        config = compose(stage, overrides)  # a mistake in the command ends here, before any process starts
        n = processes(config.parallel.processes, config.device)
        code = spawn([f"stage={stage}", *overrides], n, task=task, index=index)
        if code:
            return code
        # the next stage starts from this one's result, whatever this one started from
        overrides = [given for given in overrides if not given.startswith("init=")]
    return 0


def worker(stages: list[str], overrides: list[str]) -> int:
    """One rank of one stage."""
    from train.launch import init_group, teardown
    from train.loop import run

    if len(stages) != 1:
        raise cli.UserError(
            "torchrun, accelerate and srun with a task per GPU start one group of processes: give one stage "
            f"per launch, not {', '.join(stages)}"
        )
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = compose(stages[0], overrides)
        traces = config.run_dir / "logs" / f"nccl-{STAGES[config.stage.name]}"
        world = init_group(config.device, config.parallel.first_timeout, traces)
        return run(config, world)
    except (RuntimeError, OSError, ValueError) as error:
        said = isinstance(error, (cli.UserError, OSError))
        if int(os.environ["WORLD_SIZE"]) > 1 and not (rank == 0 and said):
            # What all ranks find the main one says, and who only lost a failed rank is ended by the launcher.
            time.sleep(PATIENCE)
        if rank == 0 or not said:
            raise
        raise cli.UserError(f"rank {rank} on {socket.gethostname()}: {error}") from error
    finally:
        teardown()


if __name__ == "__main__":
    cli.run(main)
