"""One process, DDP, FSDP2 and DeepSpeed: equal losses, gradient norms and weights; each resumes another."""

import importlib.util
import json
from functools import cache

import pytest
import torch

from data import build
from tests.train.test_run import SMALL
from train import loop
from train.config import compose
from train.launch import World, spawn

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = ["zero1", "zero2", "zero3"] if HAS_DEEPSPEED else []
STAGES = {
    "teacher": ["ddp", "fsdp2", *ZERO],
    "sparse_causal": ["ddp", "fsdp2", *ZERO[1:2]],
    "one_step": ["ddp", "fsdp2", *ZERO[1:2]],
    "decoder": ["ddp", "fsdp2", *ZERO[1:2]],
}
RESUMES = [("fsdp2", "ddp"), ("ddp", "fsdp2")]
RESUMES += [("fsdp2", "zero2"), ("zero3", "fsdp2"), ("zero2", "zero3")] if ZERO else []
SLOW = ("sparse_causal", "decoder")  # the other two have every kind of loss and two roles


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with what every stage starts from."""
    folder = tmp_path_factory.mktemp("parallel")
    build.build([], folder / "data", synthetic_clips=3, quiet=True)
    for stage in ("vae", "teacher", "sparse_causal"):
        config = compose(stage, [*overrides(folder), "steps=1"])
        assert loop.run(config, World(0, 1, 0, torch.device("cpu"))) == 0
    return folder


def overrides(folder):
    return [
        *SMALL, f"runs_dir={folder}", "run=mini", f"data.shards={folder}/data", "micro_batch_size=1",
        "global_batch_size=4", "optim.ema=0.9", "resume=force",
    ]  # fmt: skip


@cache
def results(folder, stage):
    """Numbers by world size: of the stage under every kind, and of every resumption."""
    numbers = {}
    for size, kinds in ((1, ["ddp"]), (2, STAGES[stage])):
        resumes = RESUMES if size == 2 and stage == "teacher" else []
        job = {
            "out": str(folder),
            "overrides": overrides(folder),
            "stages": {stage: kinds},
            "resumes": {stage: resumes},
        }
        (folder / "job.json").write_text(json.dumps(job))
        assert spawn([str(folder / "job.json")], size, module="tests.train.parallel_worker") == 0
        numbers[size] = json.loads((folder / f"results-{size}.json").read_text())
    return numbers


CASES = [
    pytest.param(stage, kind, marks=pytest.mark.slow if stage in SLOW else ())
    for stage, kinds in STAGES.items()
    for kind in kinds
]


@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_two_processes_equal_one(folder, stage, kind):
    """Losses, gradient norms per role and per term: to 1e-5."""
    numbers = results(folder, stage)
    one, two = numbers[1][f"{stage} ddp"]["records"], numbers[2][f"{stage} {kind}"]["records"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


@pytest.mark.parametrize(("first", "second"), RESUMES)
def test_one_kind_resumes_another(folder, first, second):
    """Weights and EMA after a step under each equal two steps under the first, up to the rounding of sums."""
    numbers = results(folder, "teacher")[2]
    whole, resumed = numbers[f"teacher {first}"], numbers[f"teacher {first}->{second}"]
    for key, value in whole["records"][1].items():
        assert resumed["records"][0][key] == pytest.approx(value, rel=1e-5), key
    for part in ("weights", "ema"):
        assert resumed[part].keys() == whole[part].keys()
        for name, value in whole[part].items():
            assert resumed[part][name] == pytest.approx(value, rel=1e-5, abs=1e-12), (part, name)


def test_deepspeed_is_there():
    if not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed: zero1, zero2 and zero3 were not tested")
