"""`python -m tests.train.parallel_table`: how far two processes are from one, per stage and way of running.

Same seed, same global batch of four; the largest relative difference of any loss, any gradient norm of a role
and any gradient norm of a term over two optimiser steps. Gloo on the CPU; a few minutes.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch

from data import build
from tests.train import parallel_worker
from tests.train.test_run import SMALL
from train import loop
from train.config import compose
from train.launch import World, spawn

ALONE = World(0, 1, 0, torch.device("cpu"))
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# From a model whose velocity head is no longer zero: behind a zero head that is frozen nothing learns.
LORA = ["stage.lora_rank=4", "init=FOLDER/mini/stage1/export"]
SMART = [*LORA, "checkpointing=selective", "offload=true"]
KINDS = ["ddp", "fsdp2", *(["zero2"] if HAS_DEEPSPEED else [])]
# Ways of running a stage on two processes, with the way on one that each must equal.
FAST = [("teacher", kind, [], "one") for kind in KINDS]
FAST += [("teacher", kind, [], "one") for kind in ("zero1", "zero3") if HAS_DEEPSPEED]
FAST += [("teacher", "fsdp2+lora+selective+offload", ["parallel=fsdp2", *SMART], "one+lora")]
FAST += [("one_step", kind, [], "one") for kind in KINDS]
SLOW = [(stage, kind, [], "one") for stage in ("vae", "sparse_causal", "decoder") for kind in KINDS]
SLOW += [
    ("sparse_causal", f"{kind}+lora+full+compile",
     [f"parallel={kind}", *LORA, "checkpointing=full", "compile=true"], "one+lora")
    for kind in KINDS
]  # fmt: skip
RESUMES = [("fsdp2", "ddp"), ("ddp", "fsdp2")]
RESUMES += [("fsdp2", "zero2"), ("zero3", "fsdp2"), ("zero2", "zero3")] if HAS_DEEPSPEED else []
REFERENCES = {"one": [], "one+lora": LORA, "one, accumulation 1": ["micro_batch_size=4"]}


def prepare(folder):
    """A run with what every stage starts from."""
    build.build([], folder / "data", synthetic_clips=3, quiet=True)
    for stage in ("vae", "teacher", "sparse_causal"):
        config = compose(stage, [*overrides(folder), "steps=1"])
        assert loop.run(config, ALONE) == 0


def overrides(folder):
    return [
        *SMALL, f"runs_dir={folder}", "run=mini", f"data.shards={folder}/data", "micro_batch_size=1",
        "global_batch_size=4", "optim.ema=0.9", "resume=force",
    ]  # fmt: skip


def alone(folder, ways):
    """On one process, in this one: numbers by stage and way."""
    wanted = [(stage, way, REFERENCES[way]) for stage, way in ways]
    return parallel_worker.run(_job(folder, wanted, []), ALONE)


def together(folder, ways, resumes=()):
    """On two processes: numbers by stage and way, and of every resumption."""
    # DeepSpeed's zero3 replaces torch's linear layers for the rest of the process: it comes last
    ways = sorted(ways, key=lambda one: one[1] == "zero3")
    job = _job(folder, [(stage, way, more or [f"parallel={way}"]) for stage, way, more, _ in ways], resumes)
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    assert spawn([str(path)], 2, module="tests.train.parallel_worker") == 0
    return json.loads((folder / "results.json").read_text())


def _job(folder, ways, resumes):
    ways = [(stage, way, [o.replace("FOLDER", str(folder)) for o in more]) for stage, way, more in ways]
    return {"out": str(folder), "overrides": overrides(folder), "ways": ways, "resumes": list(resumes)}


def largest(one, two):
    """The largest relative difference of any number of any step."""
    worst = 0.0
    for a, b in zip(one["records"], two["records"], strict=True):
        assert a.keys() == b.keys() and all(a[key] > 0 for key in a if key.startswith("grad_norm"))
        worst = max([worst, *(abs(b[key] - a[key]) / abs(a[key]) for key in a if a[key] != b[key])])
    return worst


def main():
    with tempfile.TemporaryDirectory() as name:
        folder, ways = Path(name), FAST + SLOW
        prepare(folder)
        references = list(dict.fromkeys([(stage, way) for stage, _, _, way in ways]))
        ones = alone(folder, [*references, ("teacher", "one, accumulation 1")])
        two = together(folder, ways)
    rows = [(stage, f"2 x {way}", way1, largest(ones[f"{stage} {way1}"], two[f"{stage} {way}"]))
            for stage, way, _, way1 in ways]  # fmt: skip
    again = largest(ones["teacher one"], ones["teacher one, accumulation 1"])
    rows.append(("teacher", "one, accumulation 1", "one", again))
    print(f"\n{'stage':16s}{'way':34s}{'against':12s}largest relative difference")
    for stage, way, against, worst in rows:
        print(f"{stage:16s}{way:34s}{against:12s}{worst:.1e}{'' if worst <= 1e-5 else '  above 1e-5'}")
    return int(any(row[-1] > 1e-5 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
