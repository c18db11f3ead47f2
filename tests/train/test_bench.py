"""The bench: its configuration without Hydra, random stages, and a table without packages it may lack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashvsr.base.cli import UserError
from train import bench, costs
from train.compose import compose_yaml
from train.config import STAGES, compose
from train.footprint import Saved
from train.stages.shared import Draw

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = [
    "data.height=128", "data.width=128", "data.latents_per_clip=4", "data.slots=null", "global_batch_size=1",
    "micro_batch_size=1", "log.quiet=true",
]  # fmt: skip


@pytest.mark.parametrize("scale", ["tiny", "wan1.3b"])
@pytest.mark.parametrize("stage", STAGES)
def test_yaml_alone_composes_what_hydra_does(stage, scale):
    more = ["recipe=paper", "parallel=fsdp2"] if scale == "wan1.3b" else []
    overrides = [
        f"scale={scale}",
        *more,
        "optim.lr=3e-4",
        "data.slots=null",
        "run=x",
        "optim.betas=[0.5,0.6]",
    ]
    assert compose_yaml(stage, overrides) == compose(stage, overrides)


@pytest.mark.parametrize(
    ("override", "says"), [("optim.lrr=1", "optim.lrr"), ("scale=huge", "tiny"), ("x", "x")]
)
def test_mistakes(override, says):
    with pytest.raises(UserError, match=says):
        compose_yaml("teacher", [override])


@pytest.mark.parametrize("way", ["none", "selective"])
def test_what_the_students_turn_keeps_is_what_the_estimate_says(way):
    """Real losses of the real stage 3: DiT, projector, VAE decoder and LPIPS; within 15 %."""
    # the other backends of a CPU are not fused
    config = compose("one_step", [*SMALL, f"checkpointing={way}", "stage.attention=gather"])
    cost = costs.estimate(config, 1)
    said, stage = cost.turns["student"], bench.random_stage(config, CPU)
    for role, engine in stage.roles.items():
        held = [*engine.module.parameters(), *engine.module.buffers()]
        assert cost.state[role]["weights"] == sum(t.nbytes for t in held)
        assert cost.state[role]["gradients"] == 4 * engine.count == 4 * cost.parameters[role][1]
    for name, module in (("frozen vae", stage.frozen_vae), ("frozen teacher", stage.teacher)):
        assert cost.parameters[name][0] == sum(p.numel() for p in module.parameters())
    draws = (Draw(0, step, [0]) for step in range(100))
    draw = next(d for d in draws if d.step("pixel.window") > 0.5)  # eight frames, not the five of a start
    inputs = stage.prepare(bench.random_micro(config), draw)
    roles = [engine.module for engine in stage.roles.values()]
    given = [*inputs.hr, *inputs.lr, *inputs.latents]
    with Saved(*roles, stage.frozen_vae, stage.teacher, stage.lpips, *given) as saved:
        losses = stage.student_loss(inputs, draw)
    assert losses.terms.keys() >= {"dmd", "mse", "lpips"}
    kept = [v for k, v in said.items() if not k.startswith(("one block", "VAE decode of"))]
    assert sum(kept) == pytest.approx(saved.bytes, rel=0.15)


def test_a_bench_needs_no_hydra_lpips_webdataset_or_av(tmp_path):
    """As on a machine that has torch, numpy and little else; stage 3 is then measured without LPIPS."""
    lacking = ("hydra", "omegaconf", "lpips", "torchvision", "webdataset", "av", "wandb", "deepspeed")
    code = f"""
import sys
for name in {lacking}:
    sys.modules[name] = None
from train import bench
bench.has_lpips = lambda: False
bench.WAYS = [("none", False), ("full", True)]
bench.ways = lambda config, all=bench.ways: all(config)[:2]
sys.exit(bench.main(sys.argv[1:]))
"""
    argv = ["stage=2..3", "scale=tiny", "--sizes=17x64x64", "--repeats=1", f"--json={tmp_path}/b.json"]
    run = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "WITHOUT LPIPS" in run.stdout
    found = json.loads((tmp_path / "b.json").read_text())["rows"]
    names = [row["stage"] for row in found]
    assert set(names) == {"sparse_causal", "one_step", "one_step, fake score only"}
    assert all(row["seconds"] > 0 and row["executed"] >= row["useful"] > 0 for row in found)


@pytest.mark.parametrize("argument", ["--minutes=0", "--sizes=24x64x64", "--speed=1", "stage=vae"])
def test_wrong_arguments(argument):
    with pytest.raises(UserError, match=argument.split("=")[1]):
        bench.main([argument])
