"""What `train.estimate` says, against real tiny modules: tensors, an engine's step, torch's counters."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashvsr import flops
from flashvsr.attention.plans import PackedDense, SparseCausal
from flashvsr.base.cli import UserError
from flashvsr.config import PRESETS
from train import costs, estimate, footprint, work
from train.config import compose
from train.ema import Ema
from train.optim import build_optimizer
from train.parallel.engine import Engine

TINY = PRESETS["tiny"]
GRIDS = [(4, 8, 8), (1, 8, 8)]


def config(stage="teacher", *overrides):
    sizes = ["data.height=128", "data.width=128", "data.latents_per_clip=4"]
    return compose(stage, ["scale=tiny", *sizes, *overrides])


def forward(c, module, grids, sparse):
    latents = [torch.randn(1, 16, f, 2 * h, 2 * w) for f, h, w in grids]
    lr = [torch.rand(1, 3, 4 * f + 1, 16 * h, 16 * w) for f, h, w in grids]
    if sparse:
        plan = SparseCausal(
            grids[0], block=TINY.dit.block, head_dim=TINY.dit.head_dim, ratio=0.5, backend="gather"
        )
    else:
        plan = PackedDense(grids, TINY.dit.head_dim)
    with footprint.autocast(c):
        return module(latents, torch.full((1, len(grids)), 0.5), plan, lr=lr)


@pytest.mark.parametrize("rank", [0, 4])
def test_state_is_what_an_engine_holds_after_a_step(rank):
    c = config("teacher", f"stage.lora_rank={rank}", "optim.ema=0.9")
    module = footprint.make_denoiser(c, TINY, projector=True, mode="clip")
    engine = Engine(module, lambda named: build_optimizer(named, 1e-3, 0.01, (0.9, 0.95)), 1.0)
    ema = Ema(engine.trained(), 0.9)
    engine.backward(sum(x.float().square().mean() for x in forward(c, module, GRIDS, False)))
    gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    engine.step(1e-3)
    state = [t for s in engine.optimizer.state.values() for t in s.values()]
    cost = costs.estimate(c, 1)
    said = cost.state["teacher"]
    assert cost.parameters["teacher"][:2] == (sum(p.numel() for p in module.parameters()), engine.count)
    assert said["weights"] == sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert said["gradients"] == gradients
    assert said["optimiser"] == sum(t.nbytes for t in state)
    assert said["EMA"] == sum(t.nbytes for t in ema.shadow.values())
    weights = sum(t.nbytes for t in engine.weights().values())
    moments = sum(t.nbytes for t in engine.optimizer_state().values())
    assert cost.save_host == pytest.approx(weights + moments + said["EMA"], rel=0.001)


def test_slices_of_the_parallel_kinds():
    module = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False))
    module[0].weight.requires_grad_(False)
    frozen, trained, count = 60, 40, 4

    def state(kind):
        return costs.role_state(module, kind, 4, ema=True)

    assert state("ddp")["optimiser"] == 2 * 4 * trained + count
    fsdp = state("fsdp2")  # rows 10 -> 3 on the first of four ranks, 4 -> 1
    assert fsdp["weights"] == 4 * (3 * 6 + 10) and fsdp["optimiser"] == 2 * 4 * 10 + count
    zero1, zero2, zero3 = (state(f"zero{level}") for level in (1, 2, 3))
    assert zero1["gradients"] == 4 * trained and zero2["gradients"] == trained
    assert zero1["weights"] == 4 * (frozen + trained) and zero3["weights"] == frozen + trained
    assert zero2["optimiser"] == 3 * trained + count  # two moments and a copy of the slice
    assert zero3["EMA"] == trained and zero2["EMA"] == 4 * trained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("stage", ["teacher", "sparse_causal"])
def test_activations_are_what_a_real_forward_keeps(stage, checkpointing, precision):
    c = config(stage, f"checkpointing={checkpointing}", f"precision={precision}")
    sparse, mode = (True, "causal") if stage == "sparse_causal" else (False, "clip")
    grids = GRIDS[:1] if sparse else GRIDS
    with footprint.on_fake_gpu(False):
        fake = footprint.make_denoiser(c, TINY, projector=True, mode=mode)
        said, host = footprint.denoiser(c, TINY, fake, grids, sparse=sparse)
    module = footprint.make_denoiser(c, TINY, projector=True, mode=mode)
    with footprint.Saved(module) as saved:
        forward(c, module, grids, sparse)
    assert said == pytest.approx(saved.bytes, rel=0.15)


def test_pixel_activations_of_the_decoder():
    c = config("decoder")
    said = []
    for mode in (footprint.on_fake_gpu(False), torch.random.fork_rng()):
        with mode:
            lpips, decoder = footprint.make_lpips(c), footprint.TCDecoder(TINY.tc_decoder)
            said.append(footprint.tc_pixels(c, decoder, lpips, 2, (64, 64)))
    assert said[0] == pytest.approx(said[1], rel=0.15)


def test_operations_of_stage_1():
    """The step of stage 1 without its VAE, against torch's counter on a real forward and backward."""
    c = config("teacher", "data.slots=2")
    module = footprint.make_denoiser(c, TINY, projector=True, mode="clip")
    # torch counts nothing of its fused attention on a CPU; written out, no scores are computed again
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(x.square().mean() for x in forward(c, module, GRIDS, False)).backward()
    useful, executed = work.sample(c, TINY, GRIDS, (0, 0))
    assert useful < executed and useful == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_pairs_are_a_mean_over_the_windows():
    c = config("sparse_causal", "stage.random_window=false", "stage.random_history=false")
    grid = (22, 8, 8)
    for ratio in (None, 0.5):
        fixed = replace(c, stage=replace(c.stage, sparse_ratio=ratio))
        whole = flops.clip_pairs(TINY.dit, grid, ratio=ratio, window=None)
        assert work.mean_pairs(fixed, TINY, grid) == whole < math.prod(grid) ** 2
    drawn = replace(c.stage, sparse_ratio=None, random_window=True, random_history=True)
    least, most = (flops.clip_pairs(TINY.dit, grid, ratio=None, window=w) for w in (3, None))
    assert least < work.mean_pairs(replace(c, stage=drawn), TINY, grid) < most


def test_the_most_alive_at_once():
    def run():
        x = torch.zeros(1000)
        y = x + 1
        del x
        z = y + 1
        return y, z

    assert footprint.forward_peak(run) == 2 * 4000


@pytest.mark.parametrize("stage", ["vae", "2", "3", "decoder"])
def test_every_stage_prints(stage, capsys):
    small = ["data.height=64", "data.width=64", "data.latents_per_clip=4", "gpu=rtx4090-24g", "gpus=1"]
    assert estimate.main([f"stage={stage}", "scale=tiny", *small]) == 0
    out = capsys.readouterr().out
    assert "fits" in out and "peak per GPU" in out and "efficiency 0.35" in out


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("gpu=h1000", "h100-80g"),
        ("gpus=0", "gpus=0"),
        ("gpus=3", "global_batch_size=1 is not a multiple"),
        ("efficiency=2", "efficiency=2"),
        ("optim.lrr=1", "did you mean"),
    ],
)
def test_mistakes(argument, says):
    with pytest.raises(UserError, match=says):
        estimate.main(["stage=1", "scale=tiny", argument])


def test_what_does_not_fit_is_refused_with_the_smallest_change(monkeypatch, capsys):
    c = config("sparse_causal", "checkpointing=none")
    need, less = (costs.estimate(replace(c, checkpointing=ck), 1).peak for ck in ("none", "selective"))
    between = (need + less) / 2 / estimate.GIB / (1 - estimate.RESERVE)
    monkeypatch.setitem(estimate.GPUS, "h100-80g", estimate.Gpu(between, 989, 67))
    argv = ["stage=2", "scale=tiny", "data.latents_per_clip=4"]
    with pytest.raises(
        UserError, match=r"needs .* the smallest change that fits is checkpointing=selective$"
    ):
        estimate.main(argv)
    assert "peak per GPU" in capsys.readouterr().out
    monkeypatch.setitem(estimate.GPUS, "h100-80g", estimate.Gpu(0.001, 989, 67))
    with pytest.raises(UserError, match="no change of"):
        estimate.main(argv)
