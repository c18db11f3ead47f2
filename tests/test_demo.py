"""The products of `make demo`: run with `pytest -m demo` after it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import flashvsr
from flashvsr.attention.plans import SparseCausal
from flashvsr.weights.folder import FILES

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "runs" / "demo"
STAGES = ("vae", "stage1", "stage2", "stage3", "decoder")

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(
        not (DEMO / "report.html").exists(), reason="runs/demo/report.html: `make demo` first"
    ),
]


def metrics(stage):
    return [json.loads(line) for line in (DEMO / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_the_held_out_loss_falls_by_the_factor_of_its_config(stage):
    expected = yaml.safe_load((DEMO / stage / "config.yaml").read_text())["expect"]
    losses = [m["val/loss"] for m in metrics(stage) if m["kind"] == "val"]
    assert losses[-1] <= expected * losses[0], f"{losses[0]:.4g} -> {losses[-1]:.4g}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_is_missing(stage):
    config = yaml.safe_load((DEMO / stage / "config.yaml").read_text())
    steps = [m["step"] for m in metrics(stage) if m["kind"] == "train"]
    assert steps == list(range(1, config["steps"] + 1))


def test_no_stage_is_a_renamed_copy_of_another():
    weights = [flashvsr.load(DEMO / s / "export").dit.state_dict() for s in ("stage1", "stage2", "stage3")]
    for a, b in zip(weights[:-1], weights[1:], strict=True):
        changed = [k for k in a if not torch.equal(a[k], b[k])]
        assert any("self_attn" in k for k in changed) and any("ffn" in k for k in changed)
        assert not any("text_embedding" in k or "cross_attn.k" in k for k in changed)


def test_the_export_is_the_release_layout_and_holds_the_last_stages():
    model, last = flashvsr.load(DEMO / "export"), flashvsr.load(DEMO / "stage3/export")
    assert model.info.kind == "one-step"
    assert {f.name for f in (DEMO / "export").iterdir()} == {*FILES.values(), "flashvsr.json"}
    for key, tensor in last.dit.state_dict().items():
        assert torch.equal(tensor, model.dit.state_dict()[key])
    decoder = flashvsr.load(DEMO / "decoder/export").tc_decoder.state_dict()
    assert all(torch.equal(t, model.tc_decoder.state_dict()[k]) for k, t in decoder.items())


def test_sparsity_is_real_on_the_trained_student():
    """At the training size the trained student keeps some but not all legal pairs, in every layer."""
    model = flashvsr.load(DEMO / "stage2/export")
    denoiser, config = model.denoiser().requires_grad_(False), model.config.dit
    side = int(model.info.area**0.5) // 16
    plan = SparseCausal((10, side, side), block=config.block, head_dim=config.head_dim, ratio=2.0, window=4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 16, 10, side * 2, side * 2), generator=generator)
    lr = torch.rand((1, 3, 41, side * 16, side * 16), generator=generator) * 2 - 1
    denoiser([noise], torch.ones(1, 1), plan, lr=[lr])
    legal = sum(len(chunks) for chunks in plan.visible) / len(plan.visible) ** 2
    for selection in plan.selections.values():
        assert 0 < selection.density < legal < 1


def test_the_table_has_every_method():
    results = json.loads((DEMO / "eval.json").read_text())
    text = json.dumps(results)
    for name in ("bicubic", "teacher", "one-step+VAE", "one-step+TC"):
        assert f'"{name}"' in text


def commands():
    """Every `python -m ...` line of the README's shell blocks that is marked to run on the demo."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n# on the demo's products\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python -m ")]


def test_the_readme_has_commands_for_the_demo():
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", commands())
def test_the_readmes_commands_run(command, tmp_path):
    words = shlex.split(command.replace("runs/tried", str(tmp_path)), comments=True)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
