"""MFU and HFU: a tiny step's operations as torch counts them, a closed form of the shares, known devices."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashvsr.base.draws import Draw
from flashvsr.config import PRESETS
from train import footprint, work
from train.config import compose
from train.efficiency import DEVICES, Efficiency, data_sheet, peak
from train.estimate import GPUS
from train.parallel.engine import Engine
from train.stages.feed import Inputs
from train.stages.one_step import OneStep
from train.stages.teacher import Teacher
from train.turns import reduce

TINY = PRESETS["tiny"]


def config(stage, *overrides):
    small = ["data.height=128", "data.width=128", "data.latents_per_clip=4", "data.images=1", "log.peak=0.5"]
    return compose(stage, ["scale=tiny", *small, *overrides])


def meter(c, processes=1):
    world = SimpleNamespace(size=processes)
    return Efficiency(SimpleNamespace(config=c, sizes=TINY, world=world, device=torch.device("cpu")))


def test_a_step_is_as_much_work_as_torch_counts():
    """Forward and backward of the teacher's turn, with the loop's own way of differentiating."""
    c = config("teacher")
    module = footprint.make_denoiser(c, TINY, projector=True, mode="clip")
    stage = object.__new__(Teacher)
    stage.config, stage.sizes, stage.device = c, TINY, torch.device("cpu")
    optimizer = lambda named: torch.optim.AdamW(named.values())  # noqa: E731
    stage.roles = {"teacher": Engine(module, optimizer, 1.0)}
    grids = work.grids(c)
    inputs = Inputs(
        [],
        [torch.rand(1, 3, 4 * f + 1, 16 * h, 16 * w) for f, h, w in grids],
        [torch.randn(1, 16, f, 2 * h, 2 * w) for f, h, w in grids],
        {},
    )
    ((_, loss),) = stage.turns(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.roles["teacher"].backward(reduce(loss(inputs, Draw(0, 0, [0])), 1).surrogate)
    told = meter(c).record(["teacher"], 1.0)
    per_sample = told["useful_operations"] / c.global_batch_size
    assert per_sample == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert told["executed_operations"] > told["useful_operations"]  # a fused attention makes scores twice


def test_shares_are_operations_over_seconds_devices_and_peak():
    c = config("teacher")
    told = meter(c, processes=2).record(["teacher"], 4.0)
    assert told["mfu"] == pytest.approx(told["useful_operations"] / (4.0 * 2 * 0.5e12))
    assert told["hfu"] == pytest.approx(told["executed_operations"] / (4.0 * 2 * 0.5e12))
    assert told["tokens"] == c.global_batch_size * (4 + 1) * 8 * 8
    recomputed = meter(config("teacher", "checkpointing=full")).record(["teacher"], 4.0)
    assert recomputed["useful_operations"] == told["useful_operations"]
    grids = work.grids(c)
    again = work.dit(TINY, grids, sum(f * h * w * f * h * w for f, h, w in grids)).forward
    more = recomputed["executed_operations"] - told["executed_operations"]
    assert more == pytest.approx(again * c.global_batch_size)


def test_a_step_of_the_fake_score_alone_counts_no_student():
    c = config("one_step", "stage.student_every=5")
    count = meter(c)
    often = [[role for role, _ in OneStep.turns(stage, step)] for stage in [_stage(c)] for step in range(5)]
    assert [len(roles) for roles in often] == [1, 1, 1, 1, 2]
    total = sum(count.record(roles, 1.0)["useful_operations"] for roles in often)
    grids = work.grids(c)
    with footprint.on_fake_gpu():
        pair = work.lpips(footprint.make_lpips(c), 128, 128)
    mean, _ = work.sample(c, TINY, grids, pair)
    assert total == pytest.approx(5 * mean * c.global_batch_size)
    assert count.record(often[0], 1.0)["useful_operations"] < count.record(often[4], 1.0)["useful_operations"]


def _stage(c):
    return SimpleNamespace(config=c, teacher=True, fake_loss=None, student_loss=None)


def test_without_a_known_peak_there_is_no_share():
    c = config("teacher", "log.peak=auto")
    assert {"mfu", "hfu"}.isdisjoint(meter(c).record(["teacher"], 1.0))
    assert "no MFU" in peak(c, torch.device("cpu"))[1]
    assert "tokens" not in meter(config("decoder")).record(["decoder"], 1.0)


def test_devices_by_the_names_torch_gives_them():
    assert set(DEVICES.values()) == GPUS.keys()
    for name, row in {
        "NVIDIA A100-SXM4-40GB": "a100-40g", "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA A100 80GB PCIe": "a100-80g", "NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA H200": "h200-141g",
        "NVIDIA B200": "b200-180g", "NVIDIA GeForce RTX 3090": "rtx3090-24g",
        "NVIDIA GeForce RTX 4090": "rtx4090-24g", "NVIDIA L40S": "l40s-48g",
        # other peaks than their namesakes'
        "NVIDIA H100 PCIe": None, "NVIDIA H100 NVL": None, "NVIDIA GeForce RTX 4090 D": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GB200": None, "Tesla T4": None,
    }.items():  # fmt: skip
        assert data_sheet(name) == row, name
