"""LR Proj-In's convolutions: two ways to compute them, both equal to `conv3d`; and what stays in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashvsr.config import ProjectorConfig
from flashvsr.models import lr_projector
from flashvsr.models.lr_projector import LRProjector, by_products, by_taps

WAYS = {"taps": by_taps, "products": by_products}


def inputs(dtype: torch.dtype, frames: int = 10, channels: int = 5, out: int = 7):
    torch.manual_seed(0)
    x = torch.randn(2, frames, channels, 4, 6, dtype=dtype)
    conv = nn.Conv3d(channels, out, (4, 3, 3), stride=(2, 1, 1)).to(dtype)
    return x.requires_grad_(), conv


def by_conv3d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv3d(x.transpose(1, 2), weight, bias, stride=(2, 1, 1)).transpose(1, 2)


@pytest.mark.parametrize("frames", [4, 6, 9, 10])
@pytest.mark.parametrize("way", WAYS)
def test_both_ways_are_the_convolution_and_its_gradients(way, frames):
    x, conv = inputs(torch.float64, frames)
    leaves = (x, conv.weight, conv.bias)
    results = []
    for convolve in (WAYS[way], by_conv3d):
        out = convolve(*leaves)
        torch.manual_seed(1)
        results.append([out, *torch.autograd.grad(out, leaves, torch.randn(out.shape, dtype=out.dtype))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_products_give_only_the_gradients_asked_for(frozen):
    x, conv = inputs(torch.float64)
    if frozen == "x":
        x = x.detach()
        leaves = (conv.weight, conv.bias)
    else:
        conv.requires_grad_(False)
        leaves = (x,)
    ours, theirs = (
        torch.autograd.grad(convolve(x, conv.weight, conv.bias).square().sum(), leaves)
        for convolve in (by_products, by_conv3d)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-11 * b.abs().max()


def test_products_under_autocast_compute_in_half_precision_and_give_float32_gradients():
    x, conv = inputs(torch.float32)
    results = []
    for convolve in (by_products, by_taps):
        with torch.autocast("cpu", torch.bfloat16):
            out = convolve(x, conv.weight, conv.bias)
        assert out.dtype == torch.bfloat16
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, conv.weight))])
    exact = by_conv3d(x, conv.weight, conv.bias)
    assert (results[0][0] - exact).abs().max() < 0.02 and results[0][2].dtype == torch.float32
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 0.03 * b.abs().max()


@pytest.mark.parametrize("mode", ["causal", "clip", "buffer"])
def test_a_whole_projector_is_the_same_either_way(mode, monkeypatch):
    """In float32, all modes, whole clip and call by call: as on a GPU and as on a CPU."""
    torch.manual_seed(0)
    model = LRProjector(ProjectorConfig(hidden1=12, hidden2=16, out_dim=8, layer_num=2, mode=mode))
    video = torch.rand(1, 3, 13, 64, 96) * 2 - 1

    def run():
        (a, b), memory = model(video)
        if mode != "clip":
            (c, d), _ = model(video[:, :, :8], memory)
            a, b = torch.cat([a, c], 1), torch.cat([b, d], 1)
        return a, b

    with torch.no_grad():
        expected = run()
        monkeypatch.setattr(lr_projector, "by_taps", by_products)
        products = run()
    for ours, theirs in zip(products, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_products_keep_their_input_and_nothing_unfolded():
    x, conv = inputs(torch.float32, frames=24, channels=64)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        by_products(x, conv.weight, conv.bias)
    assert sum(t.numel() for t in kept) == x.numel() + conv.weight.numel()
